"""`make demo`: prepares the bundled clips, tokenizes and reconstructs them with a small model, and says what it did."""

import sys
from pathlib import Path

import soundfile

from omnicodec_jax import cli, command
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.tokenizer import OmniCodecTokenizer

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "demo"
HELD_OUT = 0.33
"""Share of the clips: five of eleven, of every domain one or two."""


def main() -> int:
    """Exit code 0 when every clip made it there and back."""
    command.use_compilation_cache()
    manifest = ",".join(f"{domain}={cli.BUNDLED_CLIPS / domain}.jsonl" for domain in ("speech", "music", "sound"))
    cli.prepare(manifest=manifest, out=RUNS / "prepared", settings=PrepareConfig(validation=HELD_OUT))
    cli.init(ROOT / "configs" / "demo.py", RUNS / "model")
    failed = cli.encode(cli.BUNDLED_CLIPS, RUNS / "tokens", RUNS / "model")
    failed |= cli.decode(RUNS / "tokens", RUNS / "audio", RUNS / "model")

    tokenizer = OmniCodecTokenizer.from_pretrained(RUNS / "model")
    clips = sorted(cli.BUNDLED_CLIPS.glob("*.flac"))
    for clip in clips:
        original, decoded = soundfile.info(clip), soundfile.info(RUNS / "audio" / f"{clip.stem}.wav")
        failed |= original.frames != decoded.frames
    print(
        f"\n{len(clips)} clips were prepared for training. They became {tokenizer.num_quantizers} codebooks at "
        f"{tokenizer.frame_rate:g} Hz ({tokenizer.bitrate:g} bit/s) and audio again, to the sample as long as before.\n"
        f"Shards: {RUNS / 'prepared'}   Tokens: {RUNS / 'tokens'}   Audio: {RUNS / 'audio'}\n"
        "This model is untrained: its weights are random, so what it gives back is noise in the shape of the clips."
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
