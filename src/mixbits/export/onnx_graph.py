"""OnnxGraph: an ONNX graph while it grows, and the model that exporters return."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

import mixbits
from mixbits.core.check import specs
from mixbits.core.program import Program

MAX_FILE_BYTES = 2**31 - 1  # of one protobuf message
SMALL = 16  # elements up to which equal constants are stored once


@dataclass(frozen=True)
class Exported:
    """An ONNX model, and what its users should know about it, a sentence a note."""

    model: ir.Model
    notes: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """The ONNX file."""
        return ir.to_proto(self.model).SerializeToString()

    def write(self, path: str | Path) -> int:
        """Write the ONNX file, whole or not at all; returns its bytes."""
        path = Path(path)
        contents = self.to_bytes()
        if len(contents) > MAX_FILE_BYTES:
            raise ValueError(f"{path}: {len(contents)} bytes are more than one ONNX file holds (2 GiB)")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return len(contents)


class OnnxGraph:
    """Nodes and initializers so far.

    Values are named after those of the program; what an instruction needs in between gets ``#n`` behind it.
    """

    def __init__(self, program: Program, *, batch: int | None) -> None:
        """``batch``: the number of samples that every shape is fixed to; None leaves it open."""
        self.program = program
        self.specs = specs(program, 2 if batch is None else batch)  # nothing looks at an open batch's size
        self._batch: int | str = "batch" if batch is None else batch
        self.input = ir.val("input", dtype=ir.DataType.FLOAT, shape=(self._batch, *program.input_shape))
        self.scope = "input"  # the output of the instruction that nodes are added for
        self._tape = ir.tape.Tape()
        self._taken = {"input", "output"}
        self._small: dict[tuple[Any, ...], ir.Value] = {}

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attrs: Any) -> ir.Value:
        """Add a node; returns its one output."""
        name = self._unique(f"{self.scope}#1")
        return self._tape.op(kind, inputs, attrs, domain=domain, name=name, output=ir.Value(name=name))

    def constant(self, value: Any, dtype: Any = np.float32, *, name: str = "") -> ir.Value:
        """An initializer. ``dtype`` is a NumPy type, those of ``ml_dtypes`` included."""
        array: NDArray[Any] = np.asarray(value).astype(dtype)
        key = (array.dtype, array.shape, array.tobytes())
        if array.size <= SMALL and not name and key in self._small:
            return self._small[key]
        wanted = name if name and name not in self._taken else f"{name or self.scope}#1"
        made = self._tape.initializer(ir.Tensor(array, name=self._unique(wanted)))
        if array.size <= SMALL and not name:
            self._small[key] = made
        return made

    def shape(self, *sizes: int) -> ir.Value:
        """Integers for the inputs that are shapes, axes and indices."""
        return self.constant(sizes, np.int64)

    def batch_size(self) -> ir.Value:
        """The number of samples, int64 [1]."""
        if isinstance(self._batch, int):
            return self.shape(self._batch)
        return self.op("Shape", self.input, start=0, end=1)

    def name(self, value: ir.Value, name: str) -> None:
        """Give the result of a node the name that the program gives it, and its shape where that is fixed."""
        node = value.producer()
        if node is None or name in self._taken:
            return
        value.name = node.name = self._unique(name)
        if isinstance(self._batch, int):
            value.shape, value.dtype = ir.Shape(self.specs[name].shape), ir.DataType.FLOAT

    def finish(
        self, output: ir.Value, *, opsets: dict[str, int], ir_version: int, notes: tuple[str, ...]
    ) -> Exported:
        """The model whose output is this value."""
        if output.producer() is None:  # the input or a constant, which have their own names
            output = self.op("Identity", output)
        output.name = "output"
        output.dtype = ir.DataType.FLOAT
        output.shape = ir.Shape((self._batch, *self.specs[self.program.output].shape[1:]))
        graph = ir.Graph(
            [self.input],
            [output],
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=opsets,
            name="mixbits",
        )
        model = ir.Model(
            graph, ir_version=ir_version, producer_name="mixbits", producer_version=mixbits.__version__
        )
        model.metadata_props["mixbits.about"] = json.dumps(dict(self.program.about))
        RemoveUnusedNodesPass()(model)
        return Exported(model, notes)

    def _unique(self, wanted: str) -> str:
        base, _, number = wanted.rpartition("#")
        tries = int(number) if base and number.isdecimal() else 0
        name = wanted
        while name in self._taken:
            tries += 1
            name = f"{base or wanted}#{tries}"
        self._taken.add(name)
        return name
