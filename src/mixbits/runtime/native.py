"""The native engine: a plan's steps in one call, made for the batches that come."""

from __future__ import annotations

from math import inf, prod
from typing import TYPE_CHECKING

from mixbits.core.check import specs
from mixbits.core.program import Program
from mixbits.pack.bits import native_available
from mixbits.runtime.memory import Memory
from mixbits.runtime.plan import Choose, Plan, Ran, cheapest, make_plan
from mixbits.runtime.simplify import separable
from mixbits.runtime.values import Floats

if TYPE_CHECKING or native_available():
    from mixbits import _native

NOT_FINITE = "input: it holds infinities or NaN; pass finite values"
KEPT = 4  # engines of different batch sizes that are kept, where samples cannot run one by one


class Native:
    """A program on the native engine, ``threads`` threads; ``choose`` picks the kernel of each layer.

    Raises ``ValueError`` where the engine cannot run the program, naming the layer.
    """

    def __init__(
        self,
        program: Program,
        *,
        threads: int = 1,
        choose: Choose | None = None,
    ) -> None:
        check_native(threads)
        self.program, self.threads = program, threads
        self._choose = choose or cheapest
        self.separable = separable(program)  # samples run one by one
        self._engines: dict[int, tuple[_native.Engine, Plan]] = {}
        self.plan = self._engine(1)[1]

    def run(self, x: Floats, out: Floats) -> Floats:
        """Fill ``out`` with the output for ``x``, both dense; ``ValueError`` where NaN was rounded."""
        if not len(x):
            return out
        engine, plan = self._engine(1 if self.separable else len(x))
        stopped = engine.run(x, out, len(x) if self.separable else 1)
        if stopped >= 0:
            raise _not_a_number(plan.ran[stopped])
        return out

    def time(self, x: Floats, repeats: int) -> list[float]:
        """Least seconds of each step over ``repeats`` runs of ``x`` (dense), all its samples together."""
        return [seconds for _, seconds in self.steps(x, repeats)]

    def steps(self, x: Floats, repeats: int) -> list[tuple[Ran, float]]:
        """What ran, and its seconds as :meth:`time` gives them; ``ValueError`` where NaN was rounded."""
        engine, plan = self._engine(1 if self.separable else len(x))
        seconds = engine.time(x, len(x) if self.separable else 1, repeats)
        if inf in seconds:
            raise _not_a_number(plan.ran[seconds.index(inf)])
        return list(zip(plan.ran, seconds, strict=True))

    def memory(self, batch: int = 1) -> Memory:
        """What the engine for ``batch`` samples takes, as planned."""
        return self._engine(1 if self.separable else batch)[1].memory(self.threads)

    def allocated(self, batch: int = 1) -> Memory:
        """What it has allocated: after a run, as much as :meth:`memory` says."""
        return Memory(*self._engine(1 if self.separable else batch)[0].allocated())

    def _engine(self, batch: int) -> tuple[_native.Engine, Plan]:
        if batch not in self._engines:
            plan = make_plan(self.program, batch=batch, choose=self._choose)
            sizes = specs(self.program, batch)
            sample_in, sample_out = (4 * prod(sizes[name].shape) for name in ("input", self.program.output))
            engine = _native.Engine(plan.arena, plan.constants, sample_in, sample_out, self.threads)
            for make in plan.makers:
                engine.add(make())
            while len(self._engines) >= KEPT:
                del self._engines[next(iter(self._engines))]
            self._engines[batch] = engine, plan
        return self._engines[batch]


def planned_memory(
    program: Program, *, threads: int = 1, batch: int = 1, choose: Choose | None = None
) -> Memory:
    """What an engine for ``batch`` samples a run will take, from the program alone; no weight is unpacked.

    Raises ``ValueError`` where the engine cannot run the program, naming the layer.
    """
    check_native(threads)
    plan = make_plan(program, batch=1 if separable(program) else batch, choose=choose)
    return plan.memory(threads)


def check_native(threads: int) -> None:
    """Raise ``ValueError`` unless the native engine can run here with so many threads."""
    if not native_available():
        raise ValueError("mixbits was built without its native extension; see the README on building it")
    problem = _native.isa_problem()
    if problem:
        raise ValueError(f"MIXBITS_ISA: {problem}")
    if threads < 1:
        raise ValueError(f"threads is 1 or more, not {threads}")


def _not_a_number(step: Ran) -> ValueError:
    if step.of_input:
        return ValueError(NOT_FINITE)
    return ValueError(
        f"{step.names[-1]}: not a number (NaN) cannot be quantized; an operation before divided by zero or "
        "overflowed"
    )
