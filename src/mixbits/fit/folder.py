"""Run folder: the files of a run, each written whole, and a lock so that two runs never share one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mixbits.core.files import whole_file


class RunFolder:
    """Paths and whole-file writes of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; a second process gets an error instead of a mess."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.path} is in use by another mixbits process; wait for it or choose another --out"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON so that the file is whole or not there."""
        self.write_bytes(name, (json.dumps(value, indent=1) + "\n").encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write bytes so that the file is whole or not there."""
        with whole_file(self / name, alone=True) as file:
            file.write(content)

    def read_json(self, name: str) -> Any:
        """Parsed JSON of a file of this folder; errors name it."""
        path = self / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; is {self.path} the folder of a mixbits run?") from None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); run that stage again") from None

    def keep_rows(self, stage: str, step: int) -> None:
        """Drop the metrics of a stage after ``step``: a resumed stage writes them again."""
        path = self / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # torn by a killed process
            if row.get("stage") != stage or row.get("step", 0) <= step:
                kept.append(line)
        self.write_bytes("metrics.jsonl", "".join(line + "\n" for line in kept).encode())

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``, on the disk before the checkpoint that comes after it."""
        with (self / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
