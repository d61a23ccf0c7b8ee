"""Checkpoints: everything a training stage needs to go on, written so that a crash cannot lose it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixbits.core.files import whole_file

SHOWN = 3  # differences that an error names


@dataclass
class Checkpoint:
    """One stage's checkpoint file, and the file before it in case the newer one is unreadable.

    ``signature`` says by name what the stage's result depends on (options, network, data; plain values); a
    file with another one is refused. ``stop`` asks the loop to save and leave after the current step.
    """

    path: Path
    signature: Mapping[str, Any] = field(default_factory=dict)
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

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state of tensors and plain values; the file is whole or not there."""
        try:
            with whole_file(self.path, alone=True, previous=self.previous) as file:
                torch.save({"signature": dict(self.signature), "state": dict(state)}, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise OSError(
                f"the checkpoint {self.path} could not be written ({error}); "
                "free some disk space and go on with --resume"
            ) from error
        self._saved_at = time.monotonic()

    def load(self) -> tuple[dict[str, Any] | None, str]:
        """The newest readable state, or None; and a sentence for the user if the newest file was not used.

        Raises ``ValueError`` naming what differs if the file's signature is another.
        """
        note = ""
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                signature, state = saved["signature"], saved["state"]
            except Exception as error:  # torch.load raises many types on damaged files
                note = f"{path} is unreadable ({type(error).__name__}); using the checkpoint before it"
                continue
            other = differences(signature, self.signature)
            if other:
                raise ValueError(
                    f"{path} belongs to another run: {other}; resume with the same network, data and "
                    "options, or choose another output folder"
                )
            return state, note
        return None, note and note.replace("using the checkpoint before it", "starting this stage again")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two signatures, in words; empty if nothing does.

    >>> differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})
    'lr is 0.1 there and 0.2 here'
    """
    names = [name for name in {**there, **here} if _plain(there.get(name)) != _plain(here.get(name))]
    words = [f"{name} is {there.get(name)} there and {here.get(name)} here" for name in names[:SHOWN]]
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join(words + more)


def _plain(value: Any) -> Any:
    """A value as JSON would give it back: tuples become lists."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def fingerprint(*parts: Tensor | np.ndarray | str) -> str:
    """Twelve digits that tell contents apart.

    >>> fingerprint("a", torch.zeros(2)) == fingerprint("a", np.zeros(2, np.float32))
    True
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.ascontiguousarray(part))
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)  # bfloat16 too
            digest.update(content.numpy().tobytes())
    return digest.hexdigest()[:12]
