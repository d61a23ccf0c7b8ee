"""Memory of the native engine, in bytes: planned from a program, counted in an engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass

KIB = 1024


@dataclass(frozen=True)
class Memory:
    """Bytes that an engine holds while it runs, as allocated, alignment included.

    Besides these there are the program (packed weights and constants), the caller's arrays, and a few kB a
    step that say what the step is.
    """

    arenas: int  # values between steps: an arena for each thread
    scratch: int  # a layer's sums and what its kernel prepares: of the step that needs most, for each thread
    weights: int  # as kernels read them, with scales, biases, tables and constants; once for all threads

    @property
    def total(self) -> int:
        """All of it."""
        return self.arenas + self.scratch + self.weights

    def words(self, threads: int) -> str:
        """The sizes in a sentence."""
        values, scratch, weights, total = (
            f"{size / KIB:,.1f} KiB" for size in (self.arenas, self.scratch, self.weights, self.total)
        )
        return (
            f"memory of the engine: {total} = {values} of values + {scratch} of scratch (threads: {threads}) "
            f"+ {weights} of weights as kernels read them"
        )

    def to_json(self) -> dict[str, int]:
        """The fields and the total."""
        return {**asdict(self), "total": self.total}
