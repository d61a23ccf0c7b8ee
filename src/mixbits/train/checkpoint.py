"""Checkpoints: everything a training stage needs to go on, written so that a crash cannot lose it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Checkpoint:
    """One stage's checkpoint file, and the file before it in case the newer one is unreadable.

    ``signature`` names the network, data and recipe; a file with another one is refused. ``stop`` asks the
    loop to save and leave after the current step.
    """

    path: Path
    signature: str = ""
    every_seconds: float = 60.0
    stop: threading.Event = field(default_factory=threading.Event)
    _saved_at: float = field(default_factory=time.monotonic)

    @property
    def previous(self) -> Path:
        """The checkpoint before the newest one."""
        return self.path.with_suffix(".previous.pt")

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved_at >= self.every_seconds

    def save(self, state: dict[str, Any]) -> None:
        """Write, flush to disk, then rename: the file is whole or not there."""
        temporary = self.path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save({"signature": self.signature, **state}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            temporary.unlink(missing_ok=True)
            raise OSError(
                f"the checkpoint {self.path} could not be written ({error}); "
                "free some disk space and go on with --resume"
            ) from error
        if self.path.exists():
            self.path.replace(self.previous)
        temporary.replace(self.path)
        self._saved_at = time.monotonic()

    def load(self) -> tuple[dict[str, Any] | None, str]:
        """The newest readable state, or None; and a sentence for the user if the newest file was not used."""
        note = ""
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch.load raises many types on damaged files
                note = f"{path} is unreadable ({type(error).__name__}); using the checkpoint before it"
                continue
            if state.pop("signature") != self.signature:
                raise ValueError(
                    f"{path} belongs to another network, data set or recipe; resume with the same options, "
                    "or choose another output folder"
                )
            return state, note
        return None, note and note.replace("using the checkpoint before it", "starting this stage again")
