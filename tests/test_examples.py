"""The bundled audio is what it is said to be."""

from collections import Counter

import soundfile


def test_bundled_clips_are_varied_short_and_documented(clips):
    readme = (clips[0].parent / "README.md").read_text()
    kinds = Counter(clip.name.split("_")[0] for clip in clips)
    assert set(kinds) == {"speech", "music", "sound"}
    assert min(kinds.values()) >= 3
    assert sum(clip.stat().st_size for clip in clips) < 6e6
    for clip in clips:
        info = soundfile.info(clip)
        assert info.samplerate >= 24_000
        assert 3 <= info.duration <= 12
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{clip.name}`"))
        assert row.rstrip(" |").endswith(("BSD-3-Clause", "MIT-style", "CC0"))
