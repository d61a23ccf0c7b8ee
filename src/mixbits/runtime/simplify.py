"""Programs made ready for the engine: what reads what, cheaper instructions for the same values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mixbits.core.check import specs
from mixbits.core.program import Instruction, Program


def separable(program: Program) -> bool:
    """Whether samples are computed independently, so that a batch is so many runs of one sample.

    It compares the shapes for one and for two samples: no instruction may work across a dimension that grows.
    """
    one, two = (specs(program, batch) for batch in (1, 2))
    for step in program.instructions:
        across = _dims_across(step, len(one[step.inputs[0]].shape) if step.inputs else 0)
        for name in step.inputs:
            pairs = list(zip(one[name].shape, two[name].shape, strict=True))
            if any(pairs[dim][0] != pairs[dim][1] for dim in across if -len(pairs) <= dim < len(pairs)):
                return False
        if two[step.output].elements not in (one[step.output].elements, 2 * one[step.output].elements):
            return False
    return two[program.output].elements == 2 * one[program.output].elements


def _dims_across(step: Instruction, rank: int) -> Sequence[int]:
    """Dimensions of its inputs that an instruction works across or picks from."""
    attrs = step.attrs
    behind_first = range(1, rank)
    across: dict[str, Sequence[int]] = {
        "matmul": (-1, -2),
        "attention": (-1, -2),
        "linear": (-1,),
        **dict.fromkeys(("conv1d", "conv2d", "group_norm", "batch_norm", "prelu"), behind_first),
    }
    if step.op in across:
        return across[step.op]
    if step.op == "layer_norm":
        return range(-attrs["dims"], 0)
    if step.op == "pad":
        return [dim for dim, pads in enumerate(attrs["pads"]) if any(pads)]
    if "dims" in attrs and step.op != "permute":
        return attrs["dims"]
    if "dim" in attrs:
        return [attrs["dim"]]
    windows = attrs.get("kernel", attrs.get("size", ()))
    return range(-len(windows), 0)


def simplified(program: Program) -> Program:
    """The same values from cheaper instructions: rounding before pools, padding as a convolution's own.

    Rounding is monotone: the code of the largest value is the largest code.
    """
    readers = readers_of(program)
    grids = {name: spec.grid for name, spec in specs(program, 1).items()}
    steps: list[Instruction] = []
    done = set[str]()
    pads: dict[str, Instruction] = {}  # of codes, with level 0, before nothing but convolutions
    for step in program.instructions:
        reading = [reader.op for reader in readers[step.output]]
        if step.output == program.output or step.output in done:
            steps += [] if step.output in done else [step]
        elif step.op in ("max_pool", "adaptive_max_pool") and reading == ["quantize"]:
            rounding = readers[step.output][0]
            before = replace(rounding, inputs=step.inputs, output=f"{rounding.output} before {step.name}")
            steps += [before, replace(step, inputs=(before.output,), output=rounding.output)]
            done.add(rounding.output)
        elif grids[step.output] is not None and _only_pads(step) and set(reading) <= {"conv1d", "conv2d"}:
            pads[step.output] = step
        elif step.op in ("conv1d", "conv2d") and step.inputs[0] in pads:
            pad = pads[step.inputs[0]]
            both = zip(step.attrs["padding"], pad.attrs["pads"][2:], strict=True)
            padding = [[own[0] + more[0], own[1] + more[1]] for own, more in both]
            steps.append(replace(step, inputs=pad.inputs, attrs={**step.attrs, "padding": padding}))
        else:
            steps.append(step)
    return replace(program, instructions=tuple(steps))


def _only_pads(step: Instruction) -> bool:
    """Whether an instruction adds level 0 around the last dimensions, and cuts nothing off."""
    if step.op != "pad" or step.attrs["mode"] != "constant":
        return False
    images, channels, *space = step.attrs["pads"]
    return not any((*images, *channels)) and min(side for pair in space for side in pair) >= 0


def readers_of(program: Program) -> dict[str, list[Instruction]]:
    """The instructions that read each value."""
    readers: dict[str, list[Instruction]] = {"input": []}
    for step in program.instructions:
        readers[step.output] = []
    for step in program.instructions:
        for name in dict.fromkeys(step.inputs):
            readers[name].append(step)
    return readers
