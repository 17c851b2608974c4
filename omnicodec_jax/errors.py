"""Errors that a user can mend: the message says what was wrong, where, and what to do."""


class OmniCodecError(ValueError):
    """Base of all of them; a command line prints the message and exits with 1."""


class UsageError(OmniCodecError):
    """A command line that asks for what there is not; the exit code is 2."""


class ConfigError(OmniCodecError):
    """A config that cannot be: names the field, the value and what would be right."""


class AudioError(OmniCodecError):
    """Audio that cannot be encoded."""


class UnreadableError(AudioError):
    """Audio that the operating system did not give: no verdict on the file, and another time it may."""


class DataError(OmniCodecError):
    """A manifest, or prepared data, that cannot be used."""


class ModelError(OmniCodecError):
    """A model directory that is missing, incomplete or does not fit its config."""


class TokenError(OmniCodecError):
    """Tokens that this model cannot decode."""


class CheckpointError(OmniCodecError):
    """A checkpoint that cannot be written, is not there, or is of another run."""


class TrainingError(OmniCodecError):
    """A run that cannot go on."""


def told(error: BaseException) -> str:
    """An error in one line; one of the operating system as `file: what is wrong`."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
