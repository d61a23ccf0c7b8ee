"""The runtime: programs run in NumPy, without torch."""

from __future__ import annotations

from mixbits.runtime.executor import Executor

__all__ = ["Executor"]
