"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np


def own_path(name: str, path: str | os.PathLike[str]) -> Path:
    """A path that a user gave as the argument `name`; ``~`` is the home folder."""
    if not os.fspath(path):
        raise ValueError(f"{name} is empty; expected a path")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} is {str(path)!r}, and there is no home folder here; expected a "
                         "path without ~") from error  # fmt: skip


def check_plain(name: str, folder: Path) -> None:
    """Raise where a folder's path holds what libraries read as a pattern: they never find it."""
    whole = str(folder.resolve())
    if found := sorted(set(whole) & set("[]*?\\")):
        raise ValueError(f"{name} is {whole!r}, which holds {' '.join(found)}; expected a path "
                         "without [ ] * ? and \\, which checkpoints are not found in")  # fmt: skip


def fingerprint(*arrays: Any) -> str:
    """Some letters that two lists of arrays share only where all of them are equal."""
    found = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        found.update(f"{array.dtype.str} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def check_unused(name: str, folder: Path, *files: str) -> None:
    """Raise where the folder that the argument `name` asks for holds one of some files."""
    for file in files:
        if (folder / file).exists():
            raise FileExistsError(f"{name} is {str(folder)!r}, which holds {file}; expected a new "
                                  "folder")  # fmt: skip


def new_folder(name: str, path: str | os.PathLike[str], *files: str) -> Path:
    """Make the folder that the argument `name` asks for; it must not hold any of some files."""
    folder = own_path(name, path)
    check_unused(name, folder, *files)
    make_folder(name, folder)
    return folder


def make_folder(name: str, path: Path) -> None:
    """Make the folder that the argument `name` asks for, where it is not there yet.

    Raises:
        OSError: it cannot be made, or written to: better now than when there is a result.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(
            f"{name} is {str(path)!r}, which cannot be made or written to: {error.strerror}; "
            "expected a folder that is there, or in a place that may be written to"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is written and on the disk.

    A link stays, and what it leads to is replaced, with the permissions that it had. A device or a
    pipe is written to as it is.
    """
    place = Path(os.path.realpath(path))
    temporary = place.with_name(f".{os.getpid()}.{place.name[:32]}")
    try:
        if place.exists() and not place.is_file():
            with place.open("wb") as file:
                yield file
            return
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if place.exists():
            temporary.chmod(stat.S_IMODE(place.stat().st_mode))
        os.replace(temporary, place)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror or error}; expected a folder with room "
            "that may be written to. What was there is as it was"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
