"""What a run says, and leaves behind, that is refused or has options that it does not use."""

import dataclasses

import pytest

from omnicodec_jax.config import Config
from omnicodec_jax.data.claim import claim
from omnicodec_jax.errors import DataError
from omnicodec_jax.recipes import demo, released_12hz, small, small_perceptual
from omnicodec_jax.training import frozen

pytestmark = pytest.mark.quick


def test_a_run_that_is_refused_leaves_no_empty_directory(tmp_path):
    with pytest.raises(DataError, match="no prepared audio"), claim(tmp_path / "runs" / "a"):
        raise DataError("no prepared audio")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with claim(tmp_path / "kept" / "b"):
        (tmp_path / "kept" / "b" / "file").touch()
    with claim(tmp_path / "kept"):
        pass
    assert [path.name for path in (tmp_path / "kept" / "b").iterdir()] == ["file"]


def test_paths_that_nothing_of_the_config_uses_are_named_at_the_start():
    def said(config: Config, **run: str) -> list[str]:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, **run))
        return [line.partition(" = ")[0] for line in frozen.unused_paths(config)]

    assert said(demo.config, wavlm="w", encoder="e") == ["run.wavlm", "run.encoder"]
    assert said(demo.config) == said(small.config) == []
    assert said(small.config, encoder="e") == ["run.encoder"]
    computed = dataclasses.replace(small.config, data=dataclasses.replace(small.config.data, features=None))
    assert said(computed, encoder="e") == []
    assert said(small_perceptual.config, encoder="e") == []
    assert said(released_12hz.config, wavlm="w") == []
    stored = dataclasses.replace(demo.config, data=dataclasses.replace(demo.config.data, features="f"))
    (line,) = frozen.unused_paths(stored)
    assert line == (
        "data.features = 'f': passed over, since this config has no use for it (codec.semantic.source = 'log_mel')"
    )
