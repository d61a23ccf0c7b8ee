"""Random states: where the draws of training stand, so that a resumed run goes on with the same ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

RandomStates = Mapping[str, Any]  # of tensors and plain values


def random_states() -> RandomStates:
    """The random states that training may draw from: torch's on every device, NumPy's and Python's."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  of the user's data sets
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "python": random.getstate(),
    }


def set_random_states(states: RandomStates) -> None:
    """Go on drawing from where :func:`random_states` was asked."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))


@contextmanager
def own_random_states() -> Iterator[None]:
    """What is drawn inside leaves the random states as they were."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)
