"""The codec that comes with the package: small, trained on open audio, with the encoder of its semantic branch.

Its model card, in the same folder, says what it was trained on and how well it does.
"""

from pathlib import Path

DEFAULT = "small"
"""Name of the codec that commands take where none is given."""
MODELS = {DEFAULT: Path(__file__).parent / "weights" / DEFAULT}
"""Model directories that come with the package, by name."""
CARD = "README.md"
"""Name of a model card, in a model directory."""
