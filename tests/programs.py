"""Random programs of every instruction, for laws that hold for any program."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from mixbits.core.check import check
from mixbits.core.grid import Codebook, Uniform, grid_to_json
from mixbits.core.instructions import INSTRUCTIONS
from mixbits.core.program import Instruction, PackedWeight, Program
from mixbits.pack.bits import pack, packed_bytes

LIMIT = 20_000  # elements of a value: random programs must stay small
SAMPLE = (4, 6, 5)
SEEDS, TRIES = 12, 30
GRIDS = (
    Uniform(3, signed=True),
    Uniform(8, signed=False),
    Uniform(1, True, "bipolar"),
    Codebook(2, (-8, 0, 1)),
)
SHAPES = [
    (4, 4),
    (3, 6),
    (2, 5),
    (4, 4, 3),
    (6, 2, 1),
    (4, 4, 3, 3),
    (4, 1, 3, 2),
    (8, 2, 1, 1),
    (2, 1, 2, 2),
]
CONSTANTS = [(), (1,), (2,), (3,), (4,), (5,), (6,), (8,), (6, 5), (1, 4), (4, 1, 1)]


def random_attr(op: str, key: str, draw: random.Random) -> Any:
    """A value that is often of the right kind, and often just not."""
    dims = 1 if op == "conv1d" else 2 if op == "conv2d" else draw.choice((1, 2, 2, 2))
    small = [draw.randint(1, 3) for _ in range(dims)]
    choices = {
        "grid": lambda: grid_to_json(draw.choice(GRIDS)),
        "step": lambda: draw.randint(1, 2) if op == "slice" else draw.choice(("c", "c", "c", "c1")),
        "weight": lambda: (
            draw.choice((None, *map(name_of, CONSTANTS)))
            if "norm" in op
            else "w" + name_of(draw.choice(SHAPES))
        ),
        "padding": lambda: (
            [[draw.randint(0, 2) for _ in range(2)] for _ in range(dims)]
            if "conv" in op
            else [draw.randint(0, 1) for _ in range(dims)]
        ),
        "pads": lambda: [
            [draw.choice((0, 0, 1, -1, 3)) for _ in range(2)] for _ in range(draw.randint(2, 4))
        ],
        "mode": lambda: draw.choice(("constant", "reflect", "edge", "wrap")),
        "approximate": lambda: draw.choice(("none", "tanh")),
        "dim": lambda: draw.randint(0, 3),
        "dims": lambda: (
            draw.randint(1, 3)
            if op == "layer_norm"
            else draw.sample(range(4), 4)
            if op == "permute"
            else draw.sample(range(1, 4), draw.randint(1, 2))
        ),
        "shape": lambda: draw.choice(
            (
                ["batch", 4, 6, 5] if op == "expand" else [-1, 4, 30],
                ["batch", -1, -1, 5] if op == "expand" else [-1, 24, 5],
                [2, -1, -1, -1, -1] if op == "expand" else [-1, 2, 2, 6, 5],
            )
        ),
        "size": lambda: [draw.randint(1, 9) for _ in range(dims)],
        "groups": lambda: draw.choice((1, 1, 2, 4)),
        "index": lambda: draw.randint(0, 4),
        "start": lambda: draw.randint(0, 2),
        "stop": lambda: draw.randint(1, 9),
        "divisor": lambda: draw.choice((None, 3)),
        "low": lambda: draw.choice((None, -1)),
        "high": lambda: draw.choice((None, 2)),
        "bias": lambda: draw.choice((None, *map(name_of, CONSTANTS))) if "norm" in op else None,
    }
    if key in choices:
        return choices[key]()
    if key in ("kernel", "stride", "dilation"):
        return small
    attr = INSTRUCTIONS[op].attrs[key]
    if attr.holds(True):
        return draw.random() < 0.5
    return name_of(draw.choice(CONSTANTS)) if attr.holds("c") else draw.choice((0.5, 1.0, 2.0))


def name_of(shape: tuple[int, ...]) -> str:
    return "c" + "x".join(map(str, shape))


def random_step(op: str, program: Program, draw: random.Random) -> Instruction:
    """An instruction on values of the program; a layer gets a scale and a bias for each of its channels."""
    values = ["input", "input@codes", *(step.output for step in program.instructions)]
    count = INSTRUCTIONS[op].inputs
    inputs = draw.choices(
        values[:2] if draw.random() < 0.4 else values[1:], k=draw.randint(1, 3) if count is None else count
    )
    attrs = {key: random_attr(op, key, draw) for key in INSTRUCTIONS[op].attrs}
    if attrs.get("weight") in program.weights:
        attrs["scale"] = attrs["bias"] = name_of(program.weights[attrs["weight"]].shape[:1])
    number = len(program.instructions)
    return Instruction(op, f"{op}{number}", tuple(inputs), f"v{number}", attrs)


@lru_cache
def random_program(seed: int) -> Program:
    """Every instruction once, as far as the checks accept one of several tries."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    constants = {
        name_of(shape): np.abs(rng.standard_normal(shape)).astype(np.float32) + 1 for shape in CONSTANTS
    }
    weights = {}
    for shape in SHAPES:
        grid, count = draw.choice(GRIDS), int(np.prod(shape))
        codes = rng.integers(0, len(grid.levels), count).astype(np.uint8)
        weights["w" + name_of(shape)] = PackedWeight(shape, grid, pack(codes, grid.bits))
        assert weights["w" + name_of(shape)].packed.size == packed_bytes(count, grid.bits)
    step = {"grid": grid_to_json(draw.choice(GRIDS)), "step": "c"}
    codes = Instruction("quantize", "codes", ("input",), "input@codes", step)
    rows = Instruction("reshape", "rows", ("input@codes",), "rows@codes", {"shape": [-1, 4, 30]})
    program = Program(SAMPLE, "input", (codes, rows), weights, constants)
    for op in draw.sample(list(INSTRUCTIONS), len(INSTRUCTIONS)):
        for _ in range(TRIES):
            longer = replace(program, instructions=(*program.instructions, random_step(op, program, draw)))
            try:
                check(longer, max_elements=LIMIT)
            except ValueError:
                continue
            program = longer
            break
    return program
