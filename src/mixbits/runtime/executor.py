"""Executor: a program that runs, without torch: natively where it can, else on the NumPy reference."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mixbits.core.check import MAX_ELEMENTS, check, specs
from mixbits.core.grid import grid_from_json
from mixbits.core.instructions import BATCHED, CONSTANT, GRID, INSTRUCTIONS, MAYBE_CONSTANT, WEIGHT
from mixbits.core.program import Instruction, Program, last_reads
from mixbits.pack.artifact import read_program
from mixbits.pack.bits import native_available
from mixbits.runtime.memory import Memory
from mixbits.runtime.native import NOT_FINITE, Native, check_native
from mixbits.runtime.reference import REFERENCE
from mixbits.runtime.tune import tuned
from mixbits.runtime.values import Codes, Floats, Value, Weight, floats_of, unpack_weight

Engine: TypeAlias = Literal["native", "reference"]


class Executor:
    """A program made ready to run: float32 ``[n, *input_shape]`` to float32 ``[n, ...]``.

    Every instruction is one of ``runtime/reference.py``; the native engine gives the same values faster. Any
    number of samples is fine, none included. ``engine`` says which of the two runs. Several threads may call
    one executor; natively, the calls take turns.
    """

    def __init__(
        self,
        program: Program,
        *,
        threads: int = 1,
        tune: bool = False,
        engine: Engine | None = None,
        max_elements: int = MAX_ELEMENTS,
    ) -> None:
        """Check the program and make it ready; ``max_elements`` limits every value, for one sample.

        ``threads`` are the native engine's. With ``tune`` it measures which kernels are fastest, which takes
        a second or two once, and keeps what it found for the next time (``runtime/tune.py``); results are the
        same. Without ``engine`` it is native if the extension was built; if the program is one that it cannot
        run, a warning says why and the reference runs. ``ValueError`` if ``engine`` is native and it cannot,
        and for ``threads`` below 1 and a MIXBITS_ISA that names no level of this CPU.
        """
        check(program, max_elements=max_elements)
        self.program = program
        self._max_elements = max_elements
        self._last = last_reads(program)
        self._shapes: dict[int, tuple[int, ...]] = {}
        # Where all that reads the input rounds it, the engine looks at its values while it does.
        self._checks_values = any(
            "input" in step.inputs and step.op != "quantize" for step in program.instructions
        )
        self.native: Native | None = None
        if engine == "native" or (engine is None and native_available()):
            check_native(threads)  # what was asked for wrongly is an error, not a reason to run more slowly
            try:
                choose = tuned(program, threads=threads) if tune else None
                self.native = Native(program, threads=threads, choose=choose)
            except ValueError as error:
                if engine == "native":
                    raise
                self._attrs  # noqa: B018  a damaged weight is an error whatever runs
                warnings.warn(f"the NumPy reference runs, more slowly: {error}", stacklevel=2)

        if self.native is None:
            self._attrs  # noqa: B018  now, not when it first runs

    @property
    def engine(self) -> Engine:
        """What runs."""
        return "reference" if self.native is None else "native"

    def memory(self, batch: int = 1) -> Memory | None:
        """Bytes that the native engine plans for runs of ``batch`` samples; None of the reference.

        They depend on the number of threads and on the kernels that were chosen; on ``batch`` only where
        samples cannot run one by one.
        """
        return None if self.native is None else self.native.memory(batch)

    @cached_property
    def _attrs(self) -> list[dict[str, Any]]:
        """What the reference reads: attributes of each instruction, weights unpacked."""
        weights = {name: unpack_weight(name, weight) for name, weight in self.program.weights.items()}
        return [_resolve(step, self.program, weights) for step in self.program.instructions]

    @classmethod
    def from_file(cls, path: str | Path, *, threads: int = 1, tune: bool = False) -> Executor:
        """The executor of a ``.mixbits`` file."""
        return cls(read_program(Path(path)), threads=threads, tune=tune)

    def __call__(self, x: NDArray[np.float32]) -> Floats:
        """Logits of a batch, float32 ``[n, ...]``; ``ValueError`` if the input does not fit."""
        if self.native is not None:
            _check_input(x, self.program.input_shape, values=self._checks_values)
            return self.native.run(np.ascontiguousarray(x), np.empty(self._output_shape(len(x)), np.float32))
        alive: dict[str, Value] = {}
        for index, (name, value) in enumerate(self._run(x, alive), start=-1):
            read = () if index < 0 else self.program.instructions[index].inputs
            alive[name] = value
            for old in {*read, name}:
                if self._last.get(old, index) == index:
                    del alive[old]
        return floats_of(alive[self.program.output])

    def _output_shape(self, samples: int) -> tuple[int, ...]:
        if samples not in self._shapes:
            spec = specs(self.program, samples, max_elements=self._max_elements)[self.program.output]
            self._shapes = {samples: spec.shape}  # of the last batch: the next one is usually alike
        return self._shapes[samples]

    def trace(self, x: NDArray[np.float32]) -> Mapping[str, Value]:
        """Every value by name, as the reference has it: ``Codes`` or float32 arrays."""
        values: dict[str, Value] = {}
        for name, value in self._run(x, values):
            values[name] = value  # noqa: PERF403  _run reads what is here
        return values

    def _run(self, x: NDArray[np.float32], values: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
        """Names and values in order; the caller keeps in ``values`` what is still to be read."""
        _check_input(x, self.program.input_shape)
        expected = specs(self.program, len(x), max_elements=self._max_elements)
        yield "input", x
        for step, attrs in zip(self.program.instructions, self._attrs, strict=True):
            if INSTRUCTIONS[step.op].attrs.get("shape") is BATCHED:
                sizes = attrs["shape"]
                attrs = {"shape": [len(x) if s == "batch" else s for s in sizes]}  # noqa: PLW2901
            inputs = [values[name] for name in step.inputs]
            try:
                # Overflow and division by zero give infinities, as they do in torch; quantize refuses NaN.
                with np.errstate(all="ignore"):
                    value = REFERENCE[step.op](*inputs, **attrs)
            except ValueError as error:
                raise ValueError(f"{step.name}: {error}") from error
            assert value.shape == expected[step.output].shape, step.name
            assert isinstance(value, Codes) or value.dtype == np.float32, step.name
            yield step.output, value


def _resolve(step: Instruction, program: Program, weights: Mapping[str, Weight]) -> dict[str, Any]:
    """Attributes with grids, weights and constants in place of their JSON and their names."""

    def resolved(key: str, value: Any) -> Any:
        kind = INSTRUCTIONS[step.op].attrs[key]
        if kind is GRID:
            return grid_from_json(value)
        if kind is WEIGHT:
            return weights[value]
        if kind in (CONSTANT, MAYBE_CONSTANT):
            return None if value is None else program.constants[value]
        return value

    return {key: resolved(key, value) for key, value in step.attrs.items()}


def _check_input(x: NDArray[np.float32], sample: tuple[int, ...], *, values: bool = True) -> None:
    wanted = f"float32 [n, {', '.join(map(str, sample))}]"
    if not isinstance(x, np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"input: {type(x).__name__} is not a NumPy array; pass {wanted}")
    if x.dtype != np.float32:
        raise ValueError(f"input: {x.dtype} is not float32; pass {wanted}, normalized as in training")
    if x.ndim == 0 or x.shape[1:] != sample:
        raise ValueError(f"input: shape {list(x.shape)} does not fit this program; pass {wanted}")
    if values and not np.isfinite(x).all():
        raise ValueError(NOT_FINITE)
