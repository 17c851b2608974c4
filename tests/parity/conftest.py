"""What transformers finds in place of torchaudio, where that cannot be loaded."""

import torchaudio_stand_in

torchaudio_stand_in.install()
