"""A folder is one run's at a time.

The claim is a file in the folder, made so that of two who come at the same moment one gets it. It
says whose it is. A process that died leaves its claim behind, so whether it lives is looked up: on
this machine by its number *and* the time it began, since numbers come again and machines share
folders; on another one, or in another container, by the age of the file, which a living run touches
every minute. Of a job of several processes the first one claims, for all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = ".claim"
TOUCHED_EVERY = 60.0
"""Seconds after which a living run touches its claim."""
FORGOTTEN_AFTER = 600.0
"""Seconds after which a claim of another machine that nobody touched is a dead one's."""


@contextlib.contextmanager
def claimed(name: str, folder: Path) -> Iterator[None]:
    """Hold a folder that is there, the argument `name`.

    Raises:
        FileExistsError: a run that lives holds it.
    """
    file, own = folder / NAME, _own()
    with _one_at_a_time(folder):
        other = _read(file)
        if other is not None:
            if _lives(file, other):
                raise _held(name, folder, other)
            file.unlink(missing_ok=True)
        if not _made(file, own):
            raise _held(name, folder, _read(file) or own)
    over = threading.Event()
    touching = threading.Thread(target=_touch, args=(file, over), daemon=True)
    touching.start()
    try:
        yield
    finally:
        over.set()
        touching.join()
        if _read(file) == own:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Nobody else here looks at claims meanwhile: of two who see a dead one, one takes it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems know no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _held(name: str, folder: Path, other: dict[str, Any]) -> FileExistsError:
    return FileExistsError(
        f"{name} is {str(folder)!r}, which process {other['process']} on {other['host']} has held "
        f"since {other['since']}; expected a folder of its own for each run. (A claim that nobody "
        f"touches for {FORGOTTEN_AFTER / 60:g} minutes is void. Delete {NAME} if that run is over, "
        "or this folder a copy of its own.)"
    )


def _own() -> dict[str, Any]:
    return {
        "host": _host(),
        "process": os.getpid(),
        "began": _began(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "nonce": uuid.uuid4().hex,
    }


def _host() -> str:
    """What gives processes their numbers: this machine since its last start, or a container.

    Two of them may have one name.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text()[:8])
        parts.append(os.readlink("/proc/self/ns/pid"))  # a container has numbers of its own
    return " ".join(parts)


def _began(process: int) -> str | None:
    """When a process began, in the kernel's clock; ``None`` where nobody knows, or it is gone."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{process}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]  # after the name, which may hold anything
    return None


def _made(file: Path, own: dict[str, Any]) -> bool:
    """Make the claim, whole or not at all, unless there is one."""
    whole = file.with_name(f"{NAME}.{own['nonce']}")
    text = json.dumps(own)
    try:
        with whole.open("x") as written:
            written.write(text)
            written.flush()
            os.fsync(written.fileno())
        os.link(whole, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with file.open("x") as written:
                written.write(text)
        except FileExistsError:
            return False
    finally:
        whole.unlink(missing_ok=True)
    return True


def _read(file: Path) -> dict[str, Any] | None:
    """The claim; ``None`` where there is none, and unknown entries where it is damaged."""
    try:
        found = json.loads(file.read_text())
    except OSError:
        return None
    except ValueError:
        found = None
    names = ("host", "process", "began", "since")
    return dict.fromkeys(names, "unknown") | (found if isinstance(found, dict) else {})


def _lives(file: Path, other: dict[str, Any]) -> bool:
    if other["host"] == _host():
        if other["began"] is None:  # no /proc here
            with contextlib.suppress(ProcessLookupError):
                os.kill(other["process"], 0)
                return True
            return False
        return _began(other["process"]) == other["began"]
    with contextlib.suppress(OSError):
        return time.time() - file.stat().st_mtime < FORGOTTEN_AFTER
    return False


def _touch(file: Path, over: threading.Event) -> None:
    while not over.wait(TOUCHED_EVERY):
        with contextlib.suppress(OSError):
            os.utime(file)
