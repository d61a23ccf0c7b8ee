"""Checks of a whole program before it runs: names, attributes, shapes, and the memory that it will need."""

from __future__ import annotations

from collections.abc import Mapping

from mixbits.core.infer import Scope, Spec
from mixbits.core.instructions import (
    CONSTANT,
    INSTRUCTIONS,
    MAX_NAME,
    MAX_RANK,
    MAYBE_CONSTANT,
    WEIGHT,
    Declared,
    is_name,
)
from mixbits.core.program import Instruction, Program, last_reads

MAX_ELEMENTS = 2**26  # of one value, for one sample: a 1024 x 1024 map of 64 channels; 256 MiB as float32
MAX_ALIVE = 4  # times MAX_ELEMENTS: all values alive at the same time
MAX_INSTRUCTIONS = 100_000


def check(program: Program, *, max_elements: int = MAX_ELEMENTS) -> None:
    """Raise ``ValueError`` unless the program is well formed, for any batch size, and its memory bounded."""
    if len(program.instructions) > MAX_INSTRUCTIONS:
        raise ValueError(
            f"{len(program.instructions)} instructions are more than the limit of {MAX_INSTRUCTIONS}"
        )
    known = {"input"}
    for step in program.instructions:
        problem = _problem(step, program, known)
        if problem:
            raise ValueError(f"{step.name}: {problem}")
        known.add(step.output)
    if program.output not in known:
        raise ValueError(f"the output {program.output!r} is not a value that some instruction computes")
    # No batch size is written into a program that takes all of these; a size of one stretches to any other.
    for batch in (1, 2, 3):
        shape = specs(program, batch, max_elements=max_elements)[program.output].shape
        if shape[:1] != (batch,):
            raise ValueError(
                f"the output {program.output!r} of {batch} samples has shape {list(shape)}, not batch first"
            )


def _problem(step: Instruction, program: Program, known: set[str]) -> str | None:
    """What is wrong with an instruction's names and attributes, None if nothing is."""
    if step.op not in INSTRUCTIONS:
        return f"unknown instruction {step.op!r}; this mixbits has {', '.join(sorted(INSTRUCTIONS))}"
    declared = INSTRUCTIONS[step.op]
    if not is_name(step.output):
        return f"its output needs a name of 1 to {MAX_NAME} characters"
    if step.output in known:
        return f"its output {step.output!r} exists already"
    unknown = [name for name in step.inputs if name not in known]
    if unknown:
        return f"it reads {unknown[0]!r} before that is computed"
    if (len(step.inputs) != declared.inputs) if declared.inputs is not None else not step.inputs:
        wanted = "1 or more" if declared.inputs is None else declared.inputs
        return f"{step.op} takes {wanted} inputs, not {len(step.inputs)}"
    return _attr_problem(step, declared, program)


def _attr_problem(step: Instruction, declared: Declared, program: Program) -> str | None:
    if set(step.attrs) != set(declared.attrs):
        return f"{step.op} has the attributes {sorted(declared.attrs)}, not {sorted(step.attrs)}"
    for key, attr in declared.attrs.items():
        value = step.attrs[key]
        if not attr.holds(value):
            return f"{key} must be {attr.words}, not {str(value)[:80]}"
        if attr is WEIGHT and value not in program.weights:
            return f"the program has no weight {value!r}"
        if attr in (CONSTANT, MAYBE_CONSTANT) and value is not None and value not in program.constants:
            return f"the program has no constant {value!r}"
    return None


def specs(program: Program, batch: int, *, max_elements: int = MAX_ELEMENTS) -> Mapping[str, Spec]:
    """Shape and grid of every value for a batch size.

    Raises ``ValueError`` where shapes do not fit, or where a value has more than ``max_elements`` a sample,
    or all values alive at a time more than ``MAX_ALIVE`` times that. Nothing is allocated.
    """
    samples = max(batch, 1)
    constants = {name: value.shape for name, value in program.constants.items()}
    scope = Scope(batch, program.weights, constants, max_elements * samples)
    found = {"input": Spec((batch, *program.input_shape))}
    last = last_reads(program)
    alive: dict[str, int] = {"input": found["input"].elements}
    total = alive["input"]
    for index, step in enumerate(program.instructions):
        try:
            spec = INSTRUCTIONS[step.op].infer([found[name] for name in step.inputs], step.attrs, scope)
            if len(spec.shape) > MAX_RANK:
                raise ValueError(f"its output has {len(spec.shape)} dimensions, more than {MAX_RANK}")
            scope.bound(spec.elements)
        except ValueError as error:
            raise ValueError(f"{step.name}: {error}") from None
        found[step.output] = spec
        alive[step.output] = spec.elements
        total += spec.elements
        if total > MAX_ALIVE * scope.max_elements:
            raise ValueError(
                f"{step.name}: {total} elements would be in memory at once, more than the limit of "
                f"{MAX_ALIVE * scope.max_elements}"
            )
        for name in (*set(step.inputs), step.output):
            if last.get(name, index) == index:
                total -= alive.pop(name)
    return found
