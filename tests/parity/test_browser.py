"""The page of the docs that runs a codec: opened from the disk, in a browser, with a codec of random weights."""

import contextlib
import functools
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from omnicodec_jax import model_directory, shipped
from omnicodec_jax.converters.onnx_program import export_directory, export_onnx
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.tokenizer import OmniCodecTokenizer

ROOT = Path(__file__).parents[2]
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


KINDS = {".mjs": "text/javascript", ".wasm": "application/wasm"}


@pytest.fixture
def open_page(browser) -> Iterator[Any]:
    """Opens the page at an address. ONNX Runtime's files come from here in place of the network."""

    with contextlib.closing(browser.new_context(permissions=["microphone"])) as context:
        context.set_default_timeout(60_000)
        tab, complaints = context.new_page(), []
        tab.on("pageerror", lambda error: complaints.append(str(error)))

        def serve(route: Any) -> None:
            path = RUNTIME / route.request.url.rpartition("/")[2]
            headers = {"Access-Control-Allow-Origin": "*", "Content-Type": KINDS[path.suffix]}
            route.fulfill(path=path, headers=headers)

        def opened(address: str) -> Any:
            context.route("https://cdn.jsdelivr.net/**", serve)
            tab.goto(address)
            return tab

        yield opened
        assert complaints == []


@pytest.fixture
def tab(open_page) -> Any:
    """The page, opened from the disk."""
    return open_page(PAGE.as_uri())


class Files(SimpleHTTPRequestHandler):
    """The server of the standard library, which writes no line for a request."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path) -> Iterator[tuple[str, Path]]:
    """The page on a server, as `make docs` has it: its address, and the folder to put a codec into."""
    folder = tmp_path / "site"
    shutil.copytree(PAGE.parent, folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/index.html", folder
        server.shutdown()
        thread.join()


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


def test_a_clip_is_dropped_onto_the_page(tab, programs, tmp_path):
    audio_files.save(tmp_path / "clip.wav", (0.4 * np.sin(np.arange(24_000) / 15)).astype(np.float32), 24_000)
    choose_codec(tab, programs)
    drag = tab.evaluate_handle(
        """bytes => {
            const drag = new DataTransfer();
            drag.items.add(new File([new Uint8Array(bytes)], "clip.wav", {type: "audio/wav"}));
            return drag;
        }""",
        list((tmp_path / "clip.wav").read_bytes()),
    )
    tab.dispatch_event("#drop", "dragover", {"dataTransfer": drag})
    assert tab.locator("#drop.over").count() == 1
    tab.dispatch_event("#drop", "drop", {"dataTransfer": drag})
    assert "13 frames of 9 of 9 codebooks" in status(tab, "Encoded in")
    assert tab.locator("#drop.over").count() == 0


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
    status(tab, "Now choose the encoder, too: the one before is of another model")
    tab.locator("#decoder").set_input_files(programs / "decoder.onnx")
    status(tab, "Now choose the encoder.")
    tab.locator("#encoder").set_input_files(programs / "encoder-from-audio.onnx")
    status(tab, "Now choose or record a clip")


def test_the_codec_beside_the_page_is_one_click_away(open_page, site, programs, tmp_path):
    samples = (0.4 * np.sin(np.arange(24_000) / 15)).astype(np.float32)
    audio_files.save(tmp_path / "clip.wav", samples, 24_000)
    address, folder = site
    shutil.copytree(programs, folder, dirs_exist_ok=True)
    tab = open_page(address)
    tab.get_by_role("button", name="Take the bundled codec").click()
    status(tab, "Now choose or record a clip")
    tab.locator("#clip").set_input_files(tmp_path / "clip.wav")
    assert "13 frames of 9 of 9 codebooks" in status(tab, "Encoded in")


def test_where_no_codec_lies_beside_the_page_none_is_offered(open_page, site):
    tab = open_page(site[0])
    tab.wait_for_load_state("networkidle")
    assert tab.locator("#beside").is_hidden()


@pytest.mark.slow
def test_the_codec_that_comes_along_runs_on_the_page(open_page, site, clips):
    address, folder = site
    for what in ("encoder-from-audio", "decoder"):
        export_directory(str(shipped.MODELS[shipped.DEFAULT]), what, folder / f"{what}.onnx")
    tokenizer = OmniCodecTokenizer.from_pretrained()
    tab = open_page(address)
    tab.get_by_role("button", name="Take the bundled codec").click()
    status(tab, "Now choose or record a clip")
    tab.locator("#clip").set_input_files(clips[0])
    status(tab, f"of {tokenizer.num_quantizers} of {tokenizer.num_quantizers} codebooks")
    found = np.array(tab.evaluate("Array.from(state.codes.values, Number)"))
    heard = np.array(tab.evaluate("Array.from(state.clip)"), np.float32)
    expected = tokenizer.encode(heard[None, None], tokenizer.sample_rate)[0]
    assert (found.reshape(expected.shape) == expected).mean() > 0.95
