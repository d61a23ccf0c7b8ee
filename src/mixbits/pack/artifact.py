"""The file of a program: one ``.mixbits`` file in the safetensors format. Loading it runs no code.

Tensors: every packed weight as uint8, named by its site, and every constant as float32. The data of each
starts at a multiple of 64 bytes of the file: the header ends in spaces, and because the format allows no gaps
between tensors, fillers of fewer than 64 zeros stand there, whose names start with ``~``. The safetensors
metadata holds one entry, ``mixbits``: the program as JSON. The same program always gives the same bytes.

    {"format": "mixbits", "version": 1, "input_shape": [3, 32, 32], "output": "linear/linear",
     "weights": {"conv1.weight": {"shape": [16, 3, 3, 3], "grid": {"bits": 3, "signed": true, ...}}},
     "instructions": [{"op": "quantize", "name": "input", "inputs": ["input"], "output": "input@quantized",
                       "attrs": {"grid": {"bits": 8, "signed": true, "form": "full"}, "step": "input/step"}}],
     "about": {...}}

Reading maps the file into memory; tensors are read-only views of it, none is copied (but floats of files that
others wrote at odd places). The file may be deleted or replaced afterwards, as :func:`write_program` replaces
it; cutting it in place takes the memory away from under its readers.

A file may come from anywhere: everything is checked before it is used, and what reading it allocates is
bounded by the size of the file. Every problem is a ``ValueError`` that names the file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from mixbits.core.check import MAX_ELEMENTS, MAX_INSTRUCTIONS, check
from mixbits.core.files import whole_file
from mixbits.core.grid import grid_from_json, grid_to_json
from mixbits.core.instructions import MAX_RANK, MAX_SIZE, is_int, is_name
from mixbits.core.program import Instruction, PackedWeight, Program
from mixbits.pack.bits import packed_bytes, unpack

FORMAT = "mixbits"
VERSION = 1
LENGTH_BYTES = 8  # in front of the header: its length
MAX_HEADER_BYTES = 2**23  # 8 MiB: a thousand instructions take about 300 KB
MAX_ABOUT_DEPTH = 32
ALIGN = 64  # bytes: where data of tensors starts, a cache line
FILLER = "~"  # names of what stands between tensors start so
KINDS = {"F32": np.dtype("<f4"), "U8": np.dtype(np.uint8)}
REMEDY = "Lower the network again, or fetch the file again."


def write_program(program: Program, path: str | Path) -> None:
    """Write a program to one file: whole or not at all, the old file stays if anything fails.

    Raises ``ValueError`` if the program could not be read back.
    """
    path = Path(path)
    check(program)
    tensors: dict[str, NDArray[Any]] = {name: weight.packed for name, weight in program.weights.items()}
    tensors |= {
        name: np.asarray(constant, np.float32, order="C") for name, constant in program.constants.items()
    }
    if len(tensors) < len(program.weights) + len(program.constants):
        both = sorted(set(program.weights) & set(program.constants))
        raise ValueError(f"{both[0]!r} names both a weight and a constant; rename one")
    reserved = sorted(name for name in tensors if name.startswith(FILLER))
    if reserved:
        raise ValueError(f"{reserved[0]!r} starts with {FILLER!r}, as fillers of the file do; rename it")
    header: dict[str, Any] = {"__metadata__": {FORMAT: _to_text(program)}}
    data: list[bytes] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (tensors[name].dtype == np.uint8, name)):
        if end % ALIGN:
            zeros = np.zeros(-end % ALIGN, np.uint8)
            end = _append(header, data, f"{FILLER}{len(data)}", zeros, end)
        end = _append(header, data, name, tensors[name], end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGN)
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for contents in data:
            file.write(contents)


def _append(header: dict[str, Any], data: list[bytes], name: str, tensor: NDArray[Any], start: int) -> int:
    """Put a tensor behind those before it, which end at ``start``; where it ends."""
    kind = next(word for word, dtype in KINDS.items() if dtype == tensor.dtype)
    end = start + tensor.nbytes
    header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    data.append(np.asarray(tensor, KINDS[kind], order="C").tobytes())
    return end


def _to_text(program: Program) -> str:
    entry = {
        "format": FORMAT,
        "version": VERSION,
        "input_shape": list(program.input_shape),
        "output": program.output,
        "weights": {
            name: {"shape": list(weight.shape), "grid": grid_to_json(weight.grid)}
            for name, weight in program.weights.items()
        },
        "instructions": [
            {"op": i.op, "name": i.name, "inputs": list(i.inputs), "output": i.output, "attrs": dict(i.attrs)}
            for i in program.instructions
        ],
        "about": dict(program.about),
    }
    try:
        return json.dumps(entry, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:  # all but `about` has been checked
        raise ValueError(
            f"about is not JSON: {error}; use strings, finite numbers, lists and objects"
        ) from None


def read_program(path: str | Path, *, max_elements: int = MAX_ELEMENTS) -> Program:
    """The program in a file.

    ``max_elements`` is the largest value that the program may compute, for one sample. Raises ``ValueError``
    naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        contents, header, start = _mapped(path)
        return _program(_metadata(header), _tensors(header, contents[start:]), max_elements)
    except RecursionError:
        raise ValueError(f"{path}: its JSON is nested too deeply. {REMEDY}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _fail(problem: str) -> NoReturn:
    raise ValueError(f"{problem}. {REMEDY}")


def _mapped(path: Path) -> tuple[NDArray[np.uint8], dict[str, Any], int]:
    """The file's bytes as a map that is only read, its header, and where data starts."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < LENGTH_BYTES:
            _fail(f"it has {size} bytes, too few for a safetensors file")
        contents = np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
    (length,) = struct.unpack("<Q", contents[:LENGTH_BYTES].tobytes())
    if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        _fail(f"its header claims {length} bytes of a file of {size}; it is cut off or of another kind")
    start = LENGTH_BYTES + length
    return contents, _object(_json(contents[LENGTH_BYTES:start].tobytes()), "its header"), start


def _metadata(header: dict[str, Any]) -> dict[str, Any]:
    """The program's JSON object, once format and version are known to be ours."""
    metadata = _entry(header, "__metadata__")
    text = _entry(metadata, FORMAT)
    if not isinstance(text, str):
        _fail("it is not a mixbits program: its metadata has no entry 'mixbits'")
    entry = _json(text.encode("utf-8", "surrogatepass"))
    if _entry(entry, "format") != FORMAT:
        _fail("it is not a mixbits program: its metadata does not say so")
    entry = cast(dict[str, Any], entry)
    version = entry.get("version")
    if is_int(version, VERSION + 1):
        raise ValueError(f"written by a newer mixbits (format version {version}); upgrade")
    if not is_int(version, VERSION, VERSION):
        _fail(f"format version {str(version)[:80]} does not exist")
    return entry


def _entry(value: Any, key: str) -> Any:
    return cast(dict[str, Any], value).get(key) if isinstance(value, dict) else None


def _json(text: bytes) -> Any:
    """Parsed JSON without the extensions that Python allows: infinities, keys given twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("its header gives a key twice")
        return found

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"its header holds {word}")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        _fail(f"its header is not JSON ({error})")


def _tensors(header: dict[str, Any], data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Tensors by name, uint8 and float32 only: views of ``data``, which they cover without gaps."""
    rows = [(name, _place(name, row)) for name, row in header.items() if name != "__metadata__"]
    found: dict[str, NDArray[Any]] = {}
    end = 0
    for name, (kind, shape, offsets) in sorted(rows, key=lambda row: row[1].offsets):
        if offsets[0] != end or offsets[1] - end != math.prod(shape) * kind.itemsize:
            _fail(f"tensor {name!r} does not lie where the one before it ends, or has another size")
        end = offsets[1]
        tensor = data[offsets[0] : end]
        if name.startswith(FILLER):
            if kind != np.uint8 or tensor.size >= ALIGN or tensor.any():
                _fail(f"{name[:80]!r} fills a gap, but not with fewer than {ALIGN} zeros")
        elif end <= data.size:
            found[name] = np.require(tensor.view(kind).reshape(shape), requirements="A")
    if end != data.size:
        _fail(f"its tensors take {end} bytes, but {data.size} follow the header; it is damaged")
    return found


class _Place(NamedTuple):
    """A tensor as the header describes it."""

    kind: np.dtype[Any]
    shape: tuple[int, ...]
    offsets: tuple[int, int]  # of its first byte and behind its last, into the data


def _place(name: str, row: Any) -> _Place:
    row = _object(row, f"tensor {name!r}")
    if set(row) != {"dtype", "shape", "data_offsets"} or not is_name(name):
        _fail(f"tensor {name[:80]!r} has the entries {sorted(row)}, wanted: data_offsets, dtype, shape")
    if row["dtype"] not in [*KINDS]:
        _fail(f"tensor {name!r} is {str(row['dtype'])[:80]}, but only uint8 and float32 are stored")
    shape, offsets = (_sizes(name, row[key]) for key in ("shape", "data_offsets"))
    if len(shape) > MAX_RANK:
        _fail(f"tensor {name!r} has {len(shape)} dimensions")
    if len(offsets) != 2:
        _fail(f"tensor {name!r} has {len(offsets)} data_offsets, not two")
    return _Place(KINDS[row["dtype"]], shape, (offsets[0], offsets[1]))


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(is_int(size, 0, 2**63 - 1) for size in cast(list[Any], value)):
        _fail(f"tensor {name!r}: its shape and data_offsets must be lists of sizes")
    return tuple(cast(list[int], value))


def _program(entry: dict[str, Any], tensors: Mapping[str, NDArray[Any]], max_elements: int) -> Program:
    keys = {"format", "version", "input_shape", "output", "weights", "instructions", "about"}
    if set(entry) != keys:
        _fail(f"the program has the entries {sorted(entry)}, wanted are {sorted(keys)}")
    weights = {
        name: _weight(name, row, tensors) for name, row in _object(entry["weights"], "weights").items()
    }
    constants = {name: _constant(name, tensor) for name, tensor in tensors.items() if name not in weights}
    if not is_name(entry["output"]):
        _fail("output must be a name")
    rows = entry["instructions"]
    if not isinstance(rows, list) or len(cast(list[Any], rows)) > MAX_INSTRUCTIONS:
        _fail(f"instructions must be a list of at most {MAX_INSTRUCTIONS}")
    _check_depth(_object(entry["about"], "about"), MAX_ABOUT_DEPTH)
    program = Program(
        _shape(entry["input_shape"], "input_shape"),
        entry["output"],
        tuple(_instruction(index, row) for index, row in enumerate(cast(list[Any], rows))),
        weights,
        constants,
        entry["about"],
    )
    check(program, max_elements=max_elements)
    _check_use(program)
    return program


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(f"{what} must be an object")
    return cast(dict[str, Any], value)


def _shape(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(cast(list[Any], value)) >= MAX_RANK:
        _fail(f"{what} must be a list of fewer than {MAX_RANK} sizes")
    if not all(is_int(size, 1) for size in cast(list[Any], value)):
        _fail(f"{what} must hold sizes from 1 to {MAX_SIZE}")
    return tuple(cast(list[int], value))


def _weight(name: str, row: Any, tensors: Mapping[str, NDArray[Any]]) -> PackedWeight:
    row = _object(row, f"weight {name!r}")
    if set(row) != {"shape", "grid"} or not is_name(name):
        _fail(f"weight {name[:80]!r} has the entries {sorted(row)}, wanted are grid and shape")
    shape = _shape(row["shape"], f"the shape of weight {name!r}")
    if not shape:
        _fail(f"weight {name!r} has no dimensions")
    try:
        grid = grid_from_json(row["grid"])
    except ValueError as error:
        _fail(f"weight {name!r}: {error}")
    packed = tensors.get(name)
    if packed is None or packed.dtype != np.uint8 or packed.ndim != 1:
        _fail(f"weight {name!r} is not stored as one row of bytes")
    count = math.prod(shape)
    wanted = packed_bytes(count, grid.bits)
    if packed.size != wanted:
        _fail(f"weight {name!r} takes {wanted} bytes at {grid.bits} bits, but {packed.size} are stored")
    if count and int(unpack(packed, grid.bits, count).max()) >= len(grid.levels):
        _fail(f"weight {name!r} has codes beyond the {len(grid.levels)} levels of its grid")
    spare = wanted * 8 - count * grid.bits
    if spare and int(packed[-1]) >> (8 - spare):
        _fail(f"weight {name!r} has bits set behind its last code")
    return PackedWeight(shape, grid, packed)


def _constant(name: str, tensor: NDArray[Any]) -> NDArray[np.float32]:
    if tensor.dtype != np.float32:
        _fail(f"tensor {name!r} is {tensor.dtype} but no weight of the program")
    if not np.isfinite(tensor).all():
        _fail(f"constant {name!r} holds infinities or NaN")
    return tensor


def _instruction(index: int, row: Any) -> Instruction:
    row = _object(row, f"instruction {index}")
    if set(row) != {"op", "name", "inputs", "output", "attrs"}:
        _fail(f"instruction {index} has the entries {sorted(row)}, wanted: attrs, inputs, name, op, output")
    inputs = row["inputs"]
    if not all(is_name(row[key]) for key in ("op", "name", "output")):
        _fail(f"instruction {index}: op, name and output must be names")
    if not isinstance(inputs, list) or not all(map(is_name, cast(list[Any], inputs))):
        _fail(f"instruction {index}: inputs must be a list of names")
    attrs = _object(row["attrs"], f"instruction {index}: attrs")
    return Instruction(row["op"], row["name"], tuple(cast(list[str], inputs)), row["output"], attrs)


def _check_use(program: Program) -> None:
    """Steps are positive; every weight and constant is read by some instruction."""
    used: set[Any] = set()
    for step in program.instructions:
        if step.op == "quantize" and not program.constants[step.attrs["step"]] > 0:
            _fail(f"{step.name}: its step {program.constants[step.attrs['step']]} is not positive")
        used |= {value for value in step.attrs.values() if isinstance(value, str)}
    unused = sorted({*program.weights, *program.constants} - used)
    if unused:
        _fail(f"tensor {unused[0]!r} is stored but not read by any instruction")


def _check_depth(value: Any, depth: int) -> None:
    if depth == 0:
        _fail(f"about is nested deeper than {MAX_ABOUT_DEPTH}")
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(cast(dict[str, Any], value).values())
    elif isinstance(value, list):
        inner = cast(list[Any], value)
    for item in inner:
        _check_depth(item, depth - 1)
