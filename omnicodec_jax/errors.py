"""Errors that a user can mend: the message says what was wrong, where, and what to do."""


class OmniCodecError(ValueError):
    """Base of all errors that a user can mend. A command prints the message and exits with 1."""


class UsageError(OmniCodecError):
    """A wrong command line. The exit code is 2."""


class ConfigError(OmniCodecError):
    """A config with a wrong value. The message names the field, the value and what would be right."""


class AudioError(OmniCodecError):
    """Audio that cannot be encoded."""


class UnreadableError(AudioError):
    """Audio that the operating system could not read. It may be readable another time."""


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
    """Returns an error in one line; an error of the operating system as `file: what is wrong`."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
