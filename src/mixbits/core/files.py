"""Files that are whole or not there, whatever stops the process or the machine."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(
    path: Path, *, alone: bool = False, previous: Path | None = None
) -> Generator[BinaryIO, None, None]:
    """A file to write; it takes the place of ``path`` in one step, once all of it is on the disk.

    Any error leaves the old file. ``alone`` promises that no other process writes this path: then the
    unfinished file of a killed process is overwritten by the next one. ``previous`` is where the old file is
    kept.
    """
    mark = "tmp" if alone else f"{os.getpid()}.tmp"
    unfinished = path.with_name(f".{path.name}.{mark}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(path: Path) -> None:
    """Put a folder's names on the disk: without it a power cut may undo a rename."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
