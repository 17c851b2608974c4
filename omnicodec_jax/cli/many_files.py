"""Runs many files through a model at once. Each result is written as soon as it is there; a bad file costs no other."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from omnicodec_jax import names
from omnicodec_jax.errors import OmniCodecError, told
from omnicodec_jax.files import remove_leftovers


class WrittenFile(NamedTuple):
    """A file that has been written, as the command reports it."""

    seconds: float
    """Length of its audio."""
    what: str
    """Description of its contents, to be printed after its path."""


class ManyFiles:
    """Runs every file that can be read through a model, and names the others with the reason."""

    def __init__(
        self,
        verb: str,
        files: Sequence[tuple[Path, Path]],
        read: Callable[[Path, Path], tuple[Any, Any]],
        write: Callable[[Path, Any, np.ndarray], WrittenFile],
    ):
        """Takes the files, and how they are read and written.

        Args:
            verb: Name of the command, for the progress bar and the last line.
            files: Pairs of a file to read and a file to write.
            read: Reads a file, given both paths. It returns what `write` needs to know of the file, and the input of
                the model.
            write: Writes an output of the model, given the path to write to and what `read` has returned.
        """
        self._verb, self._files, self._total, self._read, self._write = verb, files, len(files), read, write
        self._remaining = iter(files)
        self._under_way: dict[Path, tuple[Path, Any]] = {}
        self._seconds, self._failed = 0.0, 0

    def run(self, model: Callable[[Iterable[tuple[Path, Any]]], Iterator[tuple[Path, np.ndarray]]], what: str) -> int:
        """Does all files, and prints what has become of each, and a last line.

        Args:
            model: `encode_each` or `decode_each` of a tokenizer. It asks for the next input only when a lane is free,
                so that memory depends on the number of lanes and not on that of files.
            what: What the last line says of the model.

        Returns:
            The exit code: 1 if a file could not be done.
        """
        remove_leftovers(*(target for _, target in self._files))
        start, is_quiet = time.perf_counter(), not sys.stderr.isatty() or self._total == 1
        with tqdm(total=self._total, desc=self._verb, unit="file", disable=is_quiet) as self._bar:
            while not self._run_what_is_left(model):
                pass
        elapsed = time.perf_counter() - start
        print(
            f"{self._verb}: {self._total - self._failed} of {self._total} files, {self._seconds:.1f} s of audio, "
            f"{what}, {self._seconds / elapsed:.1f} x real time"
        )
        return int(self._failed > 0)

    def _run_what_is_left(self, model: Callable[..., Iterator[tuple[Path, np.ndarray]]]) -> bool:
        """Returns whether all files are done. If the device fails, the files that it had are lost, and no others."""
        outputs = model(self._inputs())
        while True:
            try:
                finished = next(outputs, None)
            except Exception as error:
                if not self._under_way:
                    raise
                for source in self._under_way:
                    self._fail(source, error)
                self._under_way.clear()
                return False
            if finished is None:
                return True
            self._finish(*finished)

    def _inputs(self) -> Iterator[tuple[Path, Any]]:
        """Reads one file after the other, when the model asks for it."""
        for source, target in self._remaining:
            try:
                known, given = self._read(source, target)
            except Exception as error:  # an error in one file must not end the work on the others
                self._fail(source, error)
            else:
                self._under_way[source] = target, known
                yield source, given

    def _finish(self, source: Path, output: np.ndarray) -> None:
        """Writes the result of a file."""
        target, known = self._under_way.pop(source)
        try:
            done = self._write(target, known, output)
        except Exception as error:
            self._fail(source, error)
        else:
            self._seconds += done.seconds
            tqdm.write(names.text(f"{target}: {done.what}"))
            self._bar.update()

    def _fail(self, source: Path, error: Exception) -> None:
        """Says why a file could not be done."""
        known = isinstance(error, (OmniCodecError, OSError))
        message = told(error) if known else f"{source}: {type(error).__name__}: {error}"
        tqdm.write(f"error: {message}", file=sys.stderr)
        self._failed += 1
        self._bar.update()
