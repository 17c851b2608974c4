"""The page of the docs that runs a codec: opened from the disk, in a browser, with a codec of random weights."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from omnicodec_jax import model_directory
from omnicodec_jax.converters.onnx_program import export_onnx
from omnicodec_jax.data import audio as audio_files

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "browser" / "index.html"
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "build" / "node_modules" / "onnxruntime-web" / "dist"))

pytest.importorskip("onnxscript", reason="needs onnx and onnxscript, which make the programs")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, to compare with")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, to drive a browser")
pytestmark = pytest.mark.skipif(
    not RUNTIME.is_dir(),
    reason="needs onnxruntime-web: npm install --prefix build onnxruntime-web@1.30.0, or ONNXRUNTIME_WEB=…/dist",
)


@pytest.fixture(scope="module")
def programs(demo_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    config, variables = model_directory.load(demo_model)
    for what in ("encoder-from-audio", "decoder"):
        export_onnx(config, variables, what, folder / f"{what}.onnx")
    (folder / "other").mkdir()
    export_onnx(tiny.OMNICODEC, tiny.variables(tiny.OMNICODEC), "decoder", folder / "other" / "decoder.onnx")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium or google-chrome")
    sandbox = os.geteuid() != 0  # which the superuser cannot have
    options = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with (
        playwright.sync_playwright() as driver,
        contextlib.closing(
            driver.chromium.launch(executable_path=program, chromium_sandbox=sandbox, args=options)
        ) as browser,
    ):
        yield browser


@pytest.fixture
def tab(browser) -> Iterator[Any]:
    """The page, opened from the disk. ONNX Runtime's files come from here in place of the network."""

    def serve(route: Any) -> None:
        path = RUNTIME / route.request.url.rpartition("/")[2]
        kind = {".mjs": "text/javascript", ".wasm": "application/wasm"}[path.suffix]
        headers = {"Access-Control-Allow-Origin": "*", "Content-Type": kind}
        route.fulfill(body=path.read_bytes(), headers=headers)

    with contextlib.closing(browser.new_context(permissions=["microphone"])) as context:
        context.set_default_timeout(60_000)
        context.route("https://cdn.jsdelivr.net/**", serve)
        tab, complaints = context.new_page(), []
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(PAGE.as_uri())
        yield tab
        assert complaints == []


def status(tab: Any, text: str) -> str:
    tab.wait_for_function("text => document.getElementById('status').textContent.includes(text)", arg=text)
    return tab.locator("#status").inner_text()


def choose_codec(tab: Any, programs: Path) -> None:
    tab.locator("#encoder").set_input_files(programs / "encoder-from-audio.onnx")
    status(tab, "Now choose the decoder")
    tab.locator("#decoder").set_input_files(programs / "decoder.onnx")
    status(tab, "Now choose or record a clip")


def test_a_clip_comes_back_through_as_many_codebooks_as_are_chosen(tab, programs, tmp_path):
    samples = (0.4 * np.sin(np.arange(24_000) / 15)).astype(np.float32)
    audio_files.save(tmp_path / "clip.wav", samples, 24_000)
    choose_codec(tab, programs)
    tab.locator("#clip").set_input_files(tmp_path / "clip.wav")
    assert "13 frames of 9 of 9 codebooks" in status(tab, "Encoded in")
    decoder = onnxruntime.InferenceSession(programs / "decoder.onnx")
    for count in (9, 4, 1):
        tab.locator("#codebooks").fill(str(count))
        status(tab, f"13 frames of {count} of 9 codebooks")
        codes = tab.evaluate("Array.from(state.codes.values, Number)")
        chosen = np.array(codes).reshape(1, 9, 13)
        chosen[:, count:] = -1
        (expected,) = decoder.run(None, {"audio_codes": chosen})
        found = np.array(tab.evaluate("Array.from(state.decoded)"))
        assert np.abs(found - expected[0, 0, :24_000]).max() < 1e-4 * np.abs(expected).max()
    assert tab.evaluate("document.getElementById('after').duration") == pytest.approx(1, abs=0.01)
    clip = np.array(tab.evaluate("Array.from(state.clip)"), np.float32)
    assert np.abs(clip).max() == pytest.approx(0.95)
    encoder = onnxruntime.InferenceSession(programs / "encoder-from-audio.onnx")
    (own,) = encoder.run(None, {"input_values": clip[None, None]})
    assert (own.ravel() == codes).mean() > 0.99
    for picture in ("before-picture", "after-picture", "codes"):
        pixels = f"{{const c = document.getElementById('{picture}'); new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size}}"  # noqa: E501
        assert tab.evaluate(pixels) > 3


def test_a_recording_comes_back(tab, programs):
    choose_codec(tab, programs)
    tab.get_by_role("button", name="Record").click()
    status(tab, "Recording")
    tab.wait_for_function("state.recorder.state === 'recording'")
    tab.wait_for_function(
        "() => { state.recorder.requestData(); return state.recorded.reduce((n, part) => n + part.size, 0) > 8000; }"
    )
    tab.get_by_role("button", name="Stop").click()
    assert "of 9 codebooks" in status(tab, "Encoded in")


def test_what_does_not_fit_is_said_in_words(tab, programs, tmp_path):
    (tmp_path / "noise.onnx").write_bytes(b"\xff" * 100)
    tab.locator("#encoder").set_input_files(tmp_path / "noise.onnx")
    status(tab, "That did not work")
    tab.locator("#encoder").set_input_files(programs / "decoder.onnx")
    status(tab, "export it as --what encoder-from-audio")
    tab.locator("#encoder").set_input_files(programs / "encoder-from-audio.onnx")
    status(tab, "Now choose the decoder")
    tab.locator("#decoder").set_input_files(programs / "other" / "decoder.onnx")
    status(tab, "encoder and decoder are of different models")
