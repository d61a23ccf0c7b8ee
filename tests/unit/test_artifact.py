"""The file of a program: round trip, same bytes, nothing believed that is not checked."""

from __future__ import annotations

import json
import mmap
import os
import random
import struct
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from mixbits.core.grid import Codebook, Uniform, grid_to_json
from mixbits.core.program import Instruction, PackedWeight, Program
from mixbits.pack.artifact import read_program, write_program
from mixbits.pack.bits import pack
from mixbits.runtime import Executor

SMALL_ENOUGH = 4096  # elements that a fuzzed program may compute per value: a mutated file must not be slow


def program() -> Program:
    """Every kind of attribute once: grids, weights, constants, lists, pairs, flags, numbers, batch sizes."""
    signed, levels = Uniform(3, signed=True), Codebook(2, (-4, -1, 1, 4))
    narrow = Uniform(5, signed=True, form="narrow")
    grid = grid_to_json(Uniform(4, signed=False))
    layer = {"weight": "conv.weight", "scale": "conv/scale", "bias": "conv/bias", "groups": 2}
    layer |= {"stride": [1, 2], "padding": [[1, 0], [1, 1]], "dilation": [1, 1]}
    window = {"kernel": [2, 2], "stride": [1, 1], "padding": [0, 1]}
    head = {"weight": "head.weight", "scale": "head/scale", "bias": "head/bias"}
    steps = (
        Instruction(
            "quantize", "input", ("input",), "x", {"grid": grid_to_json(signed), "step": "input/step"}
        ),
        Instruction("conv2d", "conv", ("x",), "maps", layer),
        Instruction("quantize", "maps", ("maps",), "codes", {"grid": grid, "step": "maps/step"}),
        Instruction("max_pool", "pool", ("codes",), "small", {**window, "dilation": [1, 1], "ceil": False}),
        Instruction("mean", "mean", ("small",), "means", {"dims": [2, 3], "keepdim": False}),
        Instruction("constant", "token", (), "token", {"constant": "token"}),
        Instruction("expand", "token", ("token",), "tokens", {"shape": ["batch", -1]}),
        Instruction("add", "add", ("means", "tokens"), "sum", {}),
        Instruction("clamp", "clamp", ("sum",), "cut", {"low": None, "high": 9.5}),
        Instruction("quantize", "cut", ("cut",), "last", {"grid": grid_to_json(levels), "step": "cut/step"}),
        Instruction("linear", "head", ("last",), "y", head),
    )
    rng = np.random.default_rng(0)
    shapes = {"conv/scale": (4,), "conv/bias": (4,), "head/scale": (3,), "head/bias": (3,), "token": (1, 4)}
    constants = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    constants |= {name: np.array(0.5, np.float32) for name in ("input/step", "maps/step", "cut/step")}
    conv, linear = rng.integers(0, 31, 48).astype(np.uint8), rng.integers(0, 4, 12).astype(np.uint8)
    weights = {
        "conv.weight": PackedWeight((4, 1, 4, 3), narrow, pack(conv, 5)),
        "head.weight": PackedWeight((3, 4), levels, pack(linear, 2)),
    }
    return Program((2, 4, 5), "y", steps, weights, constants, {"classes": ["a", "b", "c"], "mean": [0.5]})


def written(folder: Path) -> bytes:
    write_program(program(), folder / "model.mixbits")
    return (folder / "model.mixbits").read_bytes()


def parts(contents: bytes) -> tuple[dict, bytes]:
    """The program's JSON, and the file without its length and header."""
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    return json.loads(header["__metadata__"]["mixbits"]), contents[8 + length :]


def with_json(contents: bytes, entry) -> bytes:
    """The file with another program JSON and the same tensors."""
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    header["__metadata__"]["mixbits"] = entry if isinstance(entry, str) else json.dumps(entry)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + contents[8 + length :]


def edit_place(name: str, change):
    """A change of a tensor's row in the header."""
    return lambda header: change(header.get(name))


def test_a_program_survives_its_file(tmp_path):
    written(tmp_path)
    again = read_program(tmp_path / "model.mixbits")
    ours = program()
    assert (again.input_shape, again.output, again.instructions) == (
        ours.input_shape,
        ours.output,
        ours.instructions,
    )
    assert again.about == ours.about
    for name, weight in ours.weights.items():
        assert (again.weights[name].shape, again.weights[name].grid) == (weight.shape, weight.grid)
        assert np.array_equal(again.weights[name].packed, weight.packed)
    assert again.constants.keys() == ours.constants.keys()
    x = np.random.default_rng(1).standard_normal((3, 2, 4, 5)).astype(np.float32)
    assert np.array_equal(Executor(again)(x), Executor(ours)(x))
    assert np.array_equal(Executor.from_file(tmp_path / "model.mixbits")(x), Executor(ours)(x))


def test_the_file_holds_packed_weights_and_float_constants(tmp_path):
    written(tmp_path)
    tensors = {
        name: tensor
        for name, tensor in load_file(tmp_path / "model.mixbits").items()
        if not name.startswith("~")
    }
    assert {name: (str(t.dtype), t.shape) for name, t in tensors.items()} == {
        "conv.weight": ("uint8", (48 * 5 // 8,)),
        "head.weight": ("uint8", (3,)),
        "conv/scale": ("float32", (4,)),
        "conv/bias": ("float32", (4,)),
        "head/scale": ("float32", (3,)),
        "head/bias": ("float32", (3,)),
        "token": ("float32", (1, 4)),
        "input/step": ("float32", ()),
        "maps/step": ("float32", ()),
        "cut/step": ("float32", ()),
    }
    assert sum(tensor.nbytes for tensor in tensors.values()) == program().size_bytes


def test_data_of_every_tensor_starts_at_a_multiple_of_64_bytes(tmp_path):
    contents = written(tmp_path)
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    starts = {
        name: 8 + length + row["data_offsets"][0] for name, row in header.items() if name[0] not in "_~"
    }
    assert starts.keys() == {*program().weights, *program().constants}
    assert all(start % 64 == 0 for start in starts.values())


def mapped_by(array: np.ndarray) -> object:
    """What holds the bytes that an array views."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


def arrays(ours: Program) -> list[np.ndarray]:
    return [*(weight.packed for weight in ours.weights.values()), *ours.constants.values()]


def test_a_program_that_was_read_views_the_mapped_file(tmp_path):
    written(tmp_path)
    again = read_program(tmp_path / "model.mixbits")
    holders = {id(mapped_by(array)) for array in arrays(again)}
    assert isinstance(mapped_by(arrays(again)[0]), mmap.mmap)
    assert len(holders) == 1
    for array in arrays(again):
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable


def test_a_file_that_is_only_readable_is_read(tmp_path):
    written(tmp_path)
    (tmp_path / "model.mixbits").chmod(0o400)
    assert read_program(tmp_path / "model.mixbits").size_bytes == program().size_bytes


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_file_may_be_deleted_or_replaced_while_its_program_runs(tmp_path, change):
    path = tmp_path / "model.mixbits"
    written(tmp_path)
    executor, x = Executor.from_file(path), np.ones((2, *program().input_shape), np.float32)
    wanted = executor(x)
    if change == "deleted":
        path.unlink()
    else:
        ours = program()
        other = {name: np.full_like(constant, 3) for name, constant in ours.constants.items()}
        write_program(replace(ours, constants=other), path)
        assert not np.array_equal(Executor.from_file(path)(x), wanted)
    assert np.array_equal(executor(x), wanted)
    assert np.array_equal(Executor(executor.program)(x), wanted)  # from the map again


@pytest.mark.parametrize("shift", range(5), ids=lambda shift: f"{shift} bytes off")
def test_files_without_alignment_are_read(tmp_path, shift):
    """As safetensors writes them, and with data at any place."""
    entry, _ = parts(written(tmp_path))
    contents = save(
        {
            name: array.copy()
            for name, array in zip([*program().weights, *program().constants], arrays(program()), strict=True)
        },
        metadata={"mixbits": json.dumps(entry)},
    )
    (length,) = struct.unpack("<Q", contents[:8])
    header = contents[8 : 8 + length] + b" " * shift
    (tmp_path / "old.mixbits").write_bytes(struct.pack("<Q", len(header)) + header + contents[8 + length :])
    again = read_program(tmp_path / "old.mixbits")
    assert all(array.flags.aligned for array in arrays(again))
    x = np.random.default_rng(2).standard_normal((2, *program().input_shape)).astype(np.float32)
    assert np.array_equal(Executor(again)(x), Executor(program())(x))


PLACES = {
    "'conv/bias' does not lie where": edit_place("conv/bias", lambda row: row["data_offsets"].reverse()),
    "'head.weight' does not lie where": edit_place("head.weight", lambda row: row["shape"].append(2)),
    "but [0-9]* follow the header": edit_place("", lambda row: None),
    "data_offsets, not two": edit_place("token", lambda row: row["data_offsets"].pop()),
    "must be lists of sizes": edit_place("token", lambda row: row["data_offsets"].insert(0, -1)),
    "has the entries": edit_place("token", lambda row: row.pop("dtype")),
    "tensor 'token' must be an object": lambda header: header.update(token=1),
    "'~1' fills a gap": edit_place("~1", lambda row: row.update(dtype="F32", shape=[row["shape"][0] // 4])),
}


@pytest.mark.parametrize("message", PLACES)
def test_tensors_that_lie_elsewhere_than_they_should_are_refused(tmp_path, message):
    contents = written(tmp_path)
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    PLACES[message](header)
    text, data = json.dumps(header).encode(), contents[8 + length :]
    if "follow" in message:
        data = data[:-1]
    (tmp_path / "broken.mixbits").write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(ValueError, match=f"broken.mixbits: .*{message}"):
        read_program(tmp_path / "broken.mixbits")


def test_fillers_hold_zeros(tmp_path):
    contents = bytearray(written(tmp_path))
    (length,) = struct.unpack("<Q", contents[:8])
    filler = json.loads(contents[8 : 8 + length])["~1"]
    contents[8 + length + filler["data_offsets"][0]] = 1
    (tmp_path / "broken.mixbits").write_bytes(contents)
    with pytest.raises(ValueError, match="'~1' fills a gap, but not with fewer than 64 zeros"):
        read_program(tmp_path / "broken.mixbits")


def test_names_of_fillers_are_refused_where_tensors_are_written(tmp_path):
    ours = program()
    constants = {**ours.constants, "~1": ours.constants["token"]}
    with pytest.raises(ValueError, match="'~1' starts with '~'"):
        write_program(replace(ours, constants=constants), tmp_path / "model.mixbits")


def test_the_same_program_gives_the_same_bytes(tmp_path):
    first = written(tmp_path)
    assert all(written(tmp_path) == first for _ in range(5))


def test_writing_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch):
    first = written(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_program(program(), tmp_path / "model.mixbits")
    assert (tmp_path / "model.mixbits").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["model.mixbits"]


@pytest.mark.parametrize("about", [{"x": float("nan")}, {"x": object()}], ids=["nan", "object"])
def test_about_must_be_json(tmp_path, about):
    ours = program()
    broken = Program(ours.input_shape, ours.output, ours.instructions, ours.weights, ours.constants, about)
    with pytest.raises(ValueError, match="about"):
        write_program(broken, tmp_path / "model.mixbits")


def edit(*path):
    """A change of the JSON: all but the last entry are keys, the last is the new value."""
    *keys, last, value = path

    def apply(entry):
        for key in keys:
            entry = entry[key]
        entry[last] = value

    return apply


EDITS = {
    "written by a newer mixbits .format version 2.; upgrade": edit("version", 2),
    "format version 0 does not exist": edit("version", 0),
    "not a mixbits program": edit("format", "other"),
    "entries": edit("extra", 1),
    "input_shape must hold sizes": edit("input_shape", [2, 0, 5]),
    "input_shape must be a list": edit("input_shape", 2),
    "instructions must be a list": edit("instructions", {}),
    "instruction 0 must be an object": edit("instructions", 0, 7),
    "inputs must be a list of names": edit("instructions", 0, "inputs", "input"),
    "attrs must be an object": edit("instructions", 0, "attrs", []),
    "unknown instruction '__import__'": edit("instructions", 0, "op", "__import__"),
    "takes 8 bytes at 5 bits, but 3 are stored": edit("weights", "head.weight", "grid", {"bits": 5}),
    "weight 'head.weight' takes": edit("weights", "head.weight", "shape", [3, 2**20]),
    "codes beyond the 3 levels": edit("weights", "head.weight", "grid", {"bits": 2, "levels": [-1, 0, 1]}),
    "weight 'head.weight': bits must be an integer": edit("weights", "head.weight", "grid", {"bits": True}),
    "about must be an object": edit("about", []),
    "nested deeper": edit("about", {"x": json.loads("[" * 50 + "]" * 50)}),
}


@pytest.mark.parametrize("message", EDITS)
def test_an_edited_file_is_refused_by_name(tmp_path, message):
    entry, _ = parts(contents := written(tmp_path))
    EDITS[message](entry)
    (tmp_path / "broken.mixbits").write_bytes(with_json(contents, entry))
    with pytest.raises(ValueError, match=f"broken.mixbits: .*{message}"):
        read_program(tmp_path / "broken.mixbits")


TEXTS = {
    "twice": '{"format": "mixbits", "format": "mixbits"}',
    "holds NaN": '{"format": NaN}',
    "not JSON": "{",
    "nested too deeply": "[" * 200_000,
    "not a mixbits program": "[]",
}


@pytest.mark.parametrize("message", TEXTS)
def test_json_that_python_would_accept_or_choke_on_is_refused(tmp_path, message):
    (tmp_path / "broken.mixbits").write_bytes(with_json(written(tmp_path), TEXTS[message]))
    with pytest.raises(ValueError, match=f"broken.mixbits: .*{message}"):
        read_program(tmp_path / "broken.mixbits")


CONTENTS = {
    "too few": b"1234",
    "claims 9000000000000000000 bytes": struct.pack("<Q", 9 * 10**18) + b"{}",
    "has no entry 'mixbits'": save({"x": np.zeros(2, np.float32)}),
    "header is not JSON": struct.pack("<Q", 3) + b"\xff\xff\xff",
}


@pytest.mark.parametrize("message", CONTENTS)
def test_other_files_are_refused(tmp_path, message):
    (tmp_path / "other.mixbits").write_bytes(CONTENTS[message])
    with pytest.raises(ValueError, match=f"other.mixbits: .*{message}"):
        read_program(tmp_path / "other.mixbits")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.mixbits: no such file"):
        read_program(tmp_path / "nowhere.mixbits")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv/bias", np.full(4, np.inf, np.float32), "holds infinities or NaN"),
        ("input/step", np.array(-1, np.float32), "not positive"),
        ("head.weight", np.array([255, 255, 255, 255], np.uint8), "but 4 are stored"),
        ("more", np.zeros(2, np.float32), "'more' is stored but not read"),
        ("more", np.zeros(2, np.int64), "only uint8 and float32"),
        ("more", np.zeros(2, np.uint8), "no weight of the program"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, name, value, message):
    entry, _ = parts(written(tmp_path))
    tensors = load_file(tmp_path / "model.mixbits") | {name: value}
    contents = save(tensors, metadata={"mixbits": json.dumps(entry)})
    (tmp_path / "broken.mixbits").write_bytes(contents)
    with pytest.raises(ValueError, match=f"broken.mixbits: .*{message}"):
        read_program(tmp_path / "broken.mixbits")


# Fuzzing: every mutated file loads and runs, or raises ValueError.

VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    7,
    2**26,
    2**63,
    10**40,
    0.5,
    -1e30,
    1e300,
    "",
    "batch",
    "input",
    "x",
    [],
    {},
    [1],
    [[1, 1]],
]


def leaves(entry, path=()):
    """Paths of everything inside a JSON value."""
    items = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def mutate_json(entry, draw: random.Random):
    """One to three entries changed, dropped, repeated, or exchanged for each other."""
    entry = deepcopy(entry)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        *path, last = draw.choice(list(leaves(entry)))
        holder = entry
        for key in path:
            holder = holder[key]
        kind = draw.random()
        if type(holder[last]) is int and kind < 0.8:  # what changes meaning rather than structure
            holder[last] = max(holder[last] + draw.choice((-2, -1, 1, 2, 1000)), draw.choice((-5, 0, 1)))
        elif kind < 0.15:
            del holder[last]
        elif kind < 0.3 and isinstance(holder, list):
            holder.insert(draw.randrange(len(holder) + 1), deepcopy(holder[last]))
        elif kind < 0.5:
            *others, other = draw.choice(list(leaves(entry)))
            source = entry
            for key in others:
                source = source[key]
            holder[last] = deepcopy(source[other])
        else:
            holder[last] = deepcopy(draw.choice(VALUES))
    return entry


def mutate(contents: bytes, entry, draw: random.Random) -> bytes:
    kind = draw.random()
    if kind < 0.6:
        return with_json(contents, mutate_json(entry, draw))
    if kind < 0.7:
        return contents[: draw.randrange(len(contents))]
    flipped = bytearray(contents)
    (length,) = struct.unpack("<Q", contents[:8])
    for _ in range(draw.randint(1, 4)):  # in the header mostly: that is where the meaning is
        at = draw.randrange(8 + length if draw.random() < 0.7 else len(flipped))
        flipped[at] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def fuzz(folder: Path, count: int, seed: int) -> int:
    """How many of ``count`` mutated files still load; anything but a ValueError fails the test."""
    entry, _ = parts(contents := written(folder))
    draw, loaded = random.Random(seed), 0
    for index in range(count):
        path = (
            folder / f"{index}.mixbits"
        )  # a new one: file systems flush a file that is cut and written again
        path.write_bytes(mutate(contents, entry, draw))
        try:
            executor = Executor(read_program(path, max_elements=SMALL_ENOUGH), max_elements=SMALL_ENOUGH)
            executor(np.ones((2, *executor.program.input_shape), np.float32))
            loaded += 1
        except ValueError as error:
            assert str(error)
        path.unlink()
    return loaded


def test_mutated_files_run_or_raise_value_error(tmp_path):
    assert 0 < fuzz(tmp_path, 4_000, seed=0) < 4_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_very_many_mutated_files_run_or_raise_value_error(tmp_path, seed):
    assert 0 < fuzz(tmp_path, 25_000, seed) < 25_000
