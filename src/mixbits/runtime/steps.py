"""What really ran: a program's speed, and the steps of the native engine with their kernels and times."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from mixbits.runtime.executor import Executor
from mixbits.runtime.values import Floats

TIMED_SECONDS = 0.2  # for which a program is timed, and then its steps
FEWEST, MOST = 3, 50  # runs


def speed(executor: Executor, x: Floats) -> dict[str, Any]:
    """JSON of how fast ``x`` ``[n, ...]`` runs, in least times; ``n`` is 1 or more.

    ``engine``, ``threads``, ``batch``; ``memory``: bytes that the native engine takes, as planned
    (``runtime/memory.py``), null of the reference; ``ms``: of a call, with all its samples; ``steps``: what
    the native engine does in order, each with ``name``: the instructions it computes; ``kernel``: that, or
    the operation; ``weight_bits`` and ``input_bits``: null if it is no layer; ``macs``; ``bytes``: inputs,
    outputs and weights, each counted once a time that the step runs; ``us``: microseconds.
    """
    x = np.ascontiguousarray(x)
    repeats = repeats_for(executor, x, TIMED_SECONDS)
    native = executor.native
    steps = [] if native is None else native.steps(x, repeats)
    times = len(x) if native is not None and native.separable else 1  # that a step runs
    return {
        "engine": executor.engine,
        "threads": 1 if native is None else native.threads,
        "batch": len(x),
        "memory": None if native is None else native.memory(len(x)).to_json(),
        "ms": round(1e3 * min(seconds_of(executor, x, repeats)), 6),
        "steps": [
            {
                "name": " + ".join(ran.names) or ran.what,
                "kernel": ran.what,
                "weight_bits": ran.weight_bits or None,
                "input_bits": ran.input_bits or None,
                "macs": times * ran.macs,
                "bytes": times * ran.bytes,
                "us": round(1e6 * seconds, 3),
            }
            for ran, seconds in steps
        ],
    }


def repeats_for(executor: Executor, x: Floats, seconds: float) -> int:
    """How many runs of ``x`` take about so long, 3 to 50."""
    once = min(seconds_of(executor, x, 2))
    return round(min(max(seconds / once, FEWEST), MOST))


def seconds_of(executor: Executor, x: Floats, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` runs of ``x``, called as users call them."""
    taken: list[float] = []
    for _ in range(repeats):
        before = time.perf_counter()
        executor(x)
        taken.append(time.perf_counter() - before)
    return taken
