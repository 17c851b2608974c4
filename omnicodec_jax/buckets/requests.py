"""Requests to the servers of buckets, which are repeated when a server does not answer, and fail with one line."""

import errno
import functools
import importlib.util
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeVar

from omnicodec_jax.errors import OmniCodecError
from omnicodec_jax.version import with_extra

T = TypeVar("T")

LIBRARIES = {"gs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
"""The module that reads URLs of a scheme."""
EXTRAS = {"gs": "gcs", "s3": "s3", "http": "http", "https": "http"}
"""The extra of this package that installs that module."""
READ_ONLY = ("hf", "http", "https")
"""The schemes of URLs that are read and never written."""
WEB = ("http", "https")
"""The schemes of web servers, which tell of single files and not of what lies in a folder."""
CREDENTIALS = {
    "gs": "give this machine's account the right, or run gcloud auth application-default login",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role",
    "hf": "run hf auth login, or set HF_TOKEN",
    **dict.fromkeys(WEB, "write the server's user and password into ~/.netrc"),
}
"""The advice to a user when a server asks for credentials."""
MISSING = {
    "hf": f"no such file or repository, or a private one ({CREDENTIALS['hf']})",
    **dict.fromkeys(WEB, "no such file on the server"),
}
"""The text of the error for a missing object, by scheme. Other schemes have the text that `missing` gives."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""The numbers of the errors that a disk of this machine raises when nothing more can be written to it."""
SILENCE = 60.0
"""Seconds without an answer after which a request is given up."""
ASK_LATER = ("408", "425", "429")
"""The answers of web servers that ask for patience; others of the four hundreds stay as they are."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds to wait before a request is repeated. A random time of up to a half is added to each."""
ASKED_AGAIN = {"gs": 0, "hf": 2}
"""The number of `PAUSES` that are used for schemes whose libraries repeat requests themselves, for half a minute.

huggingface_hub (hf) does so for files alone."""


class BucketError(OmniCodecError):
    """A URL that cannot be read or written."""


def ask(url: str, request: Callable[[Any], T]) -> T:
    """Makes a request, and repeats it when the server does not answer. Raises an OSError that names the URL."""
    scheme = url.partition("://")[0]
    system = system_of(scheme)
    for pause in (*PAUSES[: ASKED_AGAIN.get(scheme)], None):
        try:
            return request(system)
        except Exception as error:  # the libraries raise errors of any type
            trouble, is_final = _trouble(url, error)
            if is_final or pause is None:
                raise trouble from error
            time.sleep(pause * random.uniform(1, 1.5))
    raise AssertionError("the last pause is None")


@functools.lru_cache
def system_of(scheme: str) -> Any:
    """Returns fsspec's file system of a scheme. Raises BucketError where its library is not installed."""
    if importlib.util.find_spec(LIBRARIES[scheme]) is None:
        extra = EXTRAS[scheme]  # the library of the hub is always installed
        raise BucketError(f"{scheme}:// needs {LIBRARIES[scheme]}, which is not installed: {with_extra(extra)}")
    import fsspec

    for library in (LIBRARIES[scheme], "google.auth"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # these libraries also raise what they log
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "hf":
        options["block_size"] = 1  # the number of bytes that are read ahead beyond a range
    if scheme == "s3":  # `ask` repeats requests
        options["config_kwargs"] = {"retries": {"mode": "standard", "max_attempts": 1}}
    if scheme in ("gs", *WEB):
        from aiohttp import ClientTimeout  # pyright: ignore[reportMissingImports]  (gcsfs brings it, too)

        timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        if scheme == "gs":
            options["requests_timeout"] = timeout
        else:
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}  # for proxies and ~/.netrc
    system = fsspec.filesystem(scheme, **options)
    logging.getLogger(LIBRARIES[scheme]).setLevel(logging.CRITICAL)  # huggingface_hub sets its level when imported
    if scheme == "s3":
        system.retries = 1
    return system


def missing(url: str) -> FileNotFoundError:
    """Returns the error of a URL at which there is nothing."""
    return FileNotFoundError(
        errno.ENOENT, MISSING.get(url.partition("://")[0], "no such object, or no such bucket"), url
    )


def _trouble(url: str, error: Exception) -> tuple[Exception, bool]:
    """Returns an error in the words of this package, and whether it is final, so that a repetition would not help."""
    scheme = url.partition("://")[0]
    while scheme in WEB and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec says "not found", whatever went wrong
    kinds = {kind.__name__ for kind in type(error).__mro__}
    code = str(_status(error))
    advice = CREDENTIALS[scheme]
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, OmniCodecError) or (isinstance(error, OSError) and str(error.filename).startswith("/")):
        return error, True  # an OSError with an absolute path is about a file of this machine
    if isinstance(error, OSError) and error.errno in FULL:
        place = f"copies of objects go to {tempfile.gettempdir()}: make room there, or set TMPDIR"
        return OSError(error.errno, f"{os.strerror(error.errno)}; {place}", url), True
    if isinstance(error, FileNotFoundError) or (scheme in WEB and code in ("404", "410")):
        return missing(url), True
    nameless = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "TokenRetrievalError"}
    if kinds & nameless or code == "401":
        return PermissionError(errno.EACCES, f"no credentials ({text}); {advice}", url), True
    if isinstance(error, PermissionError) or code == "403" or text.startswith("Forbidden"):
        why = f"the server refuses this account ({text}); {advice}"
        return PermissionError(errno.EACCES, why, url), True
    if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
        return OSError(error.errno or errno.EIO, text, url), True
    is_final = isinstance(error, ValueError | TypeError | NotImplementedError | ImportError | MemoryError)
    is_final |= "OfflineModeIsEnabled" in kinds
    is_final |= scheme in WEB and code.startswith("4") and code not in ASK_LATER
    return OSError(errno.EIO, f"the server does not answer as it should ({text})", url), is_final


def _status(error: Exception) -> Any:
    """Returns the number of the server's answer that made a library raise an error, such as 404; "" without one."""
    for holder, name in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        if number := getattr(holder, name, ""):
            return number
    return ""
