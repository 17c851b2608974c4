"""Each table of the paper by one command: what can be measured, why the rest is not, and the quoted figures below."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks import ablations as ablation_runs
from omnicodec_jax import cli, model_directory, names, shipped
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.config import Config, PerplexityConfig
from omnicodec_jax.corpus import TokenSource
from omnicodec_jax.distributed import multihost
from omnicodec_jax.errors import ConfigError, DataError, ModelError, TrainingError
from omnicodec_jax.evaluation import paper_tables, table_run
from omnicodec_jax.evaluation.peers import PeerRequest
from omnicodec_jax.evaluation.run import Evaluation
from omnicodec_jax.language_model.perplexity import Perplexity
from omnicodec_jax.recipes import small

pytestmark = pytest.mark.minutes(1)


@pytest.fixture(scope="module")
def data(clips, tmp_path_factory) -> dict[str, Path]:
    """A second of speech and of music, and sound that no table needs."""
    folder = tmp_path_factory.mktemp("data")
    for domain in ("speech", "music"):
        (folder / domain).mkdir()
        path = next(path for path in clips if path.name.startswith(domain))
        rate = soundfile.info(path).samplerate
        samples, _ = soundfile.read(path, start=rate, stop=2 * rate)
        soundfile.write(folder / domain / path.name, samples, rate)
    return {domain: folder / domain for domain in ("speech", "music")}


@pytest.fixture
def evaluation(data, demo_model, tmp_path) -> Evaluation:
    """A small model for OmniCodec, and of the others what comes from no hub."""
    return Evaluation(data=data, out=tmp_path / "report", models={"OmniCodec": str(demo_model)}, metrics=("mcd",))


def table(evaluation: Evaluation, number: int) -> dict[str, list[str]]:
    """The cells of each row by its name, and under "" all notes."""
    lines = (evaluation.out / f"table_{number}.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {name: cells for name, *cells in rows} | {"": [line for line in lines if line.startswith("- ")]}


def test_a_table_has_the_papers_rows_measured_where_that_can_be_and_quoted_below(evaluation):
    assert table_run.run_table(1, evaluation, PerplexityConfig()) == 0
    rows = table(evaluation, 1)
    titles = [
        "Codebook size",
        "Bitrate (bps)",
        "TPS",
        "PESQ-WB",
        "PESQ-NB",
        "STOI",
        "Mel dis.",
        "MCD",
        "N-MOS",
        "S-MOS",
    ]
    assert rows["Model"] == titles
    names = [name for name in rows if name and name != "Model" and "quoted" not in name and "---" not in name]
    assert names == [
        *("WavTokenizer", "UniCodec", "AUV", "X-Codec-8L", "Mimi-16L"),
        *("OmniCodec-32L", "OmniCodec-16L", "OmniCodec-8L", "OmniCodec-F-32L", "OmniCodec-F-16L"),
    ]
    assert rows["OmniCodec-32L, quoted from the paper"][5] == "0.96 / 0.78 / 0.66"
    assert rows["WavTokenizer, quoted from the paper"] == [
        *("4096", "480", "40", "1.88 / 1.14 / 1.35", "2.44 / 1.51 / 1.77", "0.87 / 0.49 / 0.36"),
        *("0.97 / 1.16 / 1.10", "4.79 / 4.47 / 5.08", "3.02 ± 0.11", "3.11 ± 0.13"),
    ]
    measured = rows["OmniCodec-8L"]
    assert measured[:3] == ["256", "800", "100"]
    speech, music, sound = measured[6].split(" / ")
    assert float(speech) > 0
    assert float(music) > 0
    assert sound == "–"
    assert set(rows["UniCodec"]) == set(rows["OmniCodec-32L"]) == {"–"}
    notes = "\n".join(rows[""])
    assert "- UniCodec: not run; it is in no library and has no licence: give its files by --reconstructions" in notes
    assert (
        "- OmniCodec-32L: not run; the codec at hand has other numbers of codebooks: OmniCodec-8L, OmniCodec-9L"
        in notes
    )
    assert "- sound: no clips; give some by --data sound=PATH" in notes
    assert "- OmniCodec-F-16L: not run; give its model directory by --model OmniCodec-F=DIR" in notes
    for name in ("WavTokenizer", "X-Codec-8L", "Mimi-16L", "AUV"):
        assert f"- {name}: not run; {name.rpartition('-')[0] if '-' in name else name}" in notes
    assert f"- OmniCodec: the model is {evaluation.models['OmniCodec']}" in notes
    assert "- OmniCodec-9L: no row of the paper's table; see tables.md" in notes
    assert "Measured on 1 of speech, 1 of music;" in (evaluation.out / "table_1.md").read_text()


def test_a_folder_is_a_row_too_and_a_codec_that_was_asked_for_and_fails_is_an_error(evaluation, data, tmp_path):
    missing = tmp_path / os.fsdecode(b"caf\xe9")  # not UTF-8, as the table is
    evaluation = Evaluation(
        data=data,
        out=tmp_path,
        peers=(PeerRequest.parse(f"mimi={missing}"),),
        reconstructions={"UniCodec": data["speech"]},
        metrics=(),
    )
    assert table_run.run_table(1, evaluation, PerplexityConfig()) == 1
    rows = table(evaluation, 1)
    assert rows["UniCodec"][5].startswith("1.00 / –")
    assert any(note.startswith(f"- Mimi-16L: not run; Mimi: {names.text(str(missing))}") for note in rows[""])


def test_a_folder_without_the_clips_is_a_row_without_figures_and_an_error(evaluation, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "of_another_name.wav").touch()
    evaluation = dataclasses.replace(evaluation, models={}, reconstructions={"UniCodec": tmp_path / "other"})
    assert table_run.run_table(1, evaluation, PerplexityConfig()) == 1
    rows = table(evaluation, 1)
    assert set("".join(rows["UniCodec"])) == set("– /")
    assert any(note.startswith("- the folder holds no reconstruction of this clip: ") for note in rows[""])


def test_without_any_system_a_table_measures_the_codec_that_comes_along(monkeypatch, tmp_path):
    asked = []
    monkeypatch.delenv("OMNICODEC_MODEL", raising=False)
    monkeypatch.setattr(table_run, "run_table", lambda number, evaluation, _: asked.append(evaluation.models) or 0)
    (tmp_path / "table_1.md").write_text("the table\n")
    cli.evaluate(table=1, out=tmp_path)
    cli.evaluate(table=1, out=tmp_path, peers="opus")
    assert asked == [{"OmniCodec": str(shipped.MODELS[shipped.DEFAULT])}, {}]


def test_a_metric_that_cannot_be_computed_says_why(evaluation, monkeypatch):
    monkeypatch.setenv("OMNICODEC_AUDIOBOX", str(evaluation.out / "none"))
    evaluation = dataclasses.replace(evaluation, models={}, reconstructions={"Mimi-16L": evaluation.data["music"]})
    assert table_run.run_table(3, evaluation, PerplexityConfig()) == 1  # as there is no figure in it
    rows = table(evaluation, 3)
    assert rows["Ground Truth"] == rows["Mimi codec-16L"] == ["–"] * 8
    assert any(note.startswith("- CE: ") and note.endswith(": CE (all systems)") for note in rows[""])
    assert not any("Mimi" in note and "not run" in note for note in rows[""])


def test_a_language_model_learns_the_codes_that_the_evaluation_has_made(evaluation, monkeypatch):
    workdirs = []

    def measure(tokens: Path, config: PerplexityConfig, workdir: Path) -> Perplexity:
        source = TokenSource(tokens)
        assert source.contract["codebook_sizes"] == [256] * 8
        assert source.contract["frame_rate"] == 12.5
        assert [clip.domain for clip in (source[n] for n in range(len(source)))] == ["speech", "music"]
        assert source[0].codes.shape == (13, 8)
        assert workdir.parent == evaluation.out / "language_models" / "OmniCodec-8L"
        workdirs.append(workdir)
        each = {d: Perplexity("flat", ppl, 1, {}) for d, ppl in (("speech", (3.0, 5.0)), ("music", (7.0, 7.0)))}
        return Perplexity("flat", (5.0, 6.0), 2, each)

    monkeypatch.setattr(table_run.perplexity, "measure", measure)
    assert table_run.run_table(4, evaluation, PerplexityConfig()) == 0
    rows = table(evaluation, 4)
    assert rows["Model"] == ["Speech", "Music", "Sound"]
    assert rows["OmniCodec-8L"] == ["3.00 / 4.00", "7.00 / 7.00", "–"]
    assert rows["DAC-8L, quoted from the paper"] == ["19.84 / 237.26", "8.54 / 113.09", "4.60 / 67.96"]
    table_run.run_table(4, evaluation, PerplexityConfig())
    table_run.run_table(4, evaluation, PerplexityConfig(seed=1))
    for path in (evaluation.out / "codes" / "OmniCodec-8L").rglob("*.npy"):  # as another model of the name writes them
        np.save(path, np.load(path) ^ 1)
    table_run.run_table(4, evaluation, PerplexityConfig())
    assert workdirs[0] == workdirs[1]
    assert len(set(workdirs)) == 3

    def too_few(*_: object) -> Perplexity:
        raise DataError("none is held out")

    monkeypatch.setattr(table_run.perplexity, "measure", too_few)
    assert table_run.run_table(4, evaluation, PerplexityConfig()) == 1
    assert "- OmniCodec-8L: no perplexity: none is held out" in table(evaluation, 4)[""]


def test_quoted_cells_are_as_many_as_the_columns_and_domains_are_the_tables():
    tables = {number: make() for number, make in paper_tables.TABLES.items()}
    for one in tables.values():
        assert {len(row.quoted) for row in one.rows} == {len(one.columns)}
    assert tables[2].rows[1].quoted[5:8] == ("18.44", "207.21", "0.981")
    assert [row.system for row in tables[2].rows][1] == "without_semantic_branch-16L"
    assert tables[3].domains == ("music", "sound")
    assert [title for title, _ in tables[3].columns][3:5] == ["GTZAN testset PQ", "AudioSet eval CE"]
    assert dict(zip([row.name for row in tables[3].rows], [row.quoted for row in tables[3].rows], strict=True))[
        "Ground Truth"
    ] == ("7.44", "7.41", "6.40", "7.52", "4.03", "5.62", "3.71", "6.10")


def test_tables_and_data_that_do_not_fit_are_refused(evaluation, data, tmp_path):
    with pytest.raises(ConfigError, match="--table 5: must be one of 1, 2, 3, 4"):
        table_run.run_table(5, evaluation, PerplexityConfig())
    speech = Evaluation(data={"speech": data["speech"]}, out=tmp_path, metrics=())
    with pytest.raises(ConfigError, match="Table 3 is of music, sound; none of these domains is given"):
        table_run.run_table(3, speech, PerplexityConfig())
    mistyped = dataclasses.replace(evaluation, data={**data, "speach": data["speech"]})
    with pytest.raises(ConfigError, match="--data speach: the paper's tables have the domains speech, music, sound"):
        table_run.run_table(1, mistyped, PerplexityConfig())


def test_one_command_prints_a_table(monkeypatch, tmp_path, capsys):
    asked = []

    def run_table(number: int, evaluation: Evaluation, language_model: PerplexityConfig) -> int:
        asked.append((number, evaluation.models, language_model.num_codebooks))
        (tmp_path / "table_2.md").write_text("the table\n")
        return 0

    monkeypatch.setattr(table_run, "run_table", run_table)
    assert cli.evaluate(table=2, model="some/model", out=tmp_path, language_model="language_model_demo") == 0
    assert asked == [(2, {"OmniCodec": "some/model"}, 8)]
    assert capsys.readouterr().out == "the table\n"
    assert np.isfinite(asked[0][0])


def test_a_table_whose_language_model_is_asked_to_stop_ends_in_one_line(monkeypatch, tmp_path, caplog):
    def run_table(*_: object) -> int:
        raise multihost.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(table_run, "run_table", run_table)
    with caplog.at_level("INFO"):
        assert cli.evaluate(table=4, model="some/model", out=tmp_path, language_model="language_model_demo") == 143
    assert "interrupted: what is done is kept" in caplog.text


def test_the_table_of_ablations_has_perplexity_and_use_of_codebooks():
    name = "without_adapter_1-16L"
    means = {metric: {"mean": 0.5, "why": None} for metric in paper_tables.SIGNAL_METRICS}
    report = {
        "systems": [{"name": name, "usage": {"speech": [1.0, 0.5]}}],
        "domains": ["speech"],
        "metrics": [{"name": metric, "title": metric} for metric in means],
        "compared": {name: {"speech": means}},
        "left_out": {},
    }
    speech = Perplexity("flat", (2.0, 4.0), 1, {})
    measured = paper_tables.Measured(
        report, {name: Perplexity("flat", (9.0, 9.0), 1, {"speech": speech})}, {"speech": 3}, {}
    )
    text = table_run.layout(paper_tables.TABLES[2](), measured, {})
    row = "| w/o Adapter-1 | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 | 2.00 | 3.00 | 0.750 | – | – |"
    assert row in text.splitlines()
    assert "- w/o Semantic branch: not run; give its model directory by --model without_semantic_branch=DIR" in text
    assert "Measured on 3 of speech;" in text


def test_codebooks_of_several_sizes_are_learnt_each_with_its_own(tmp_path):
    (tmp_path / "scores.jsonl").write_text('{"system": "a-2L", "domain": "speech", "clip": "one"}\n')
    (folder := tmp_path / "codes" / "a-2L" / "speech").mkdir(parents=True)
    np.save(folder / "one.npy", np.array([[7, 7], [3, 3]], np.uint16))
    system = {"name": "a-2L", "codebook_size": 8, "codebook_sizes": [8, 4], "num_codebooks": 2, "tokens_per_second": 25}
    tokens = table_run._shards(tmp_path, system)
    assert tokens is not None
    assert TokenSource(tokens).contract["codebook_sizes"] == [8, 4]
    assert TokenSource(tokens).contract["frame_rate"] == 12.5


def test_every_ablation_can_be_made_of_the_small_recipe_and_is_as_long_as_it_should_be():
    runs = dict(ablation_runs.variants(ablation_runs.shortened(small.config, 250), Path("whole")))
    steps = {name: run.optimizer.total_steps for name, run in runs.items()}
    assert steps.pop("fine_tuned") == 12  # a twentieth
    assert runs["fine_tuned"].run.start_from == "whole"
    papers = ("without_semantic_branch", "without_adapter_1", "without_self_guidance", "speech_only")
    assert steps == dict.fromkeys(("whole", *papers, "log_mel_source"), 250)
    assert runs["without_semantic_branch"].codec.num_quantizers == small.config.codec.num_quantizers
    assert runs["log_mel_source"].codec.semantic.source == "log_mel"


def test_models_of_ablations_bring_the_encoder_that_their_tokens_need(monkeypatch, tmp_path):
    exported = {}
    monkeypatch.setattr(ablation_runs.loop, "run", lambda config, workdir: 0)
    monkeypatch.setattr(ablation_runs, "export_model", lambda workdir, out, encoder: exported.update({out: encoder}))
    with_encoder = dataclasses.replace(small.config.run, encoder="models/whisper")
    for name, run in ablation_runs.variants(dataclasses.replace(small.config, run=with_encoder), tmp_path):
        model = ablation_runs.train(run, tmp_path / name)
        needs = name not in ("without_semantic_branch", "log_mel_source")
        assert exported[model] == (Path("models/whisper") if needs else None), name
    with pytest.raises(ConfigError, match="--encoder is missing: the models tokenize with that of source='whisper'"):
        ablation_runs.main(Path("small"))
    with pytest.raises(ModelError, match="nothing: no such model directory"):
        ablation_runs.main(Path("small"), encoder=str(tmp_path / "nothing"))


def test_ablations_take_the_encoder_that_the_command_names(monkeypatch, tmp_path):
    trained: list[Config] = []

    def train(config: Config, folder: Path) -> Path:
        trained.append(config)
        raise TrainingError("far enough")

    monkeypatch.setattr(ablation_runs, "train", train)
    clips = f"speech={BUNDLED_CLIPS / 'speech.jsonl'}"
    encoder = str(shipped.MODELS[shipped.DEFAULT] / model_directory.ENCODER)
    with pytest.raises(TrainingError, match="far enough"):
        ablation_runs.main(Path("small"), work=tmp_path, encoder=encoder, data=clips)
    assert trained[0].run.encoder == encoder
