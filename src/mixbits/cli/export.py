"""``mixbits export``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mixbits.core.program import Program
from mixbits.fit.stages import network_of
from mixbits.pack.artifact import read_program


@dataclass(frozen=True)
class Export:
    """Write a trained, packed network as a file of another ecosystem, and say what runs it how."""

    model: tyro.conf.Positional[Path]  # folder of a run, or a .mixbits file
    # onnx: QuantizeLinear and DequantizeLinear; qonnx: for FPGA tools; hls4ml: the same in the form
    # that it reads, which changes the network; torchao: widths of weights, JSON
    to: Literal["onnx", "qonnx", "hls4ml", "torchao"]
    out: Path  # the file to write
    runtime: Annotated[Literal["any", "onnxruntime"], tyro.conf.arg(name="for")] = (
        "any"  # onnx: onnxruntime takes the types that it runs fast
    )
    smallest: Literal[8, 4, 2] = 4  # onnx: bits of the narrowest type; 2 needs opset 25
    power_of_two: bool = False  # qonnx: round every step to a power of two; changes the network
    node: Literal["IntQuant", "Quant"] = "IntQuant"  # qonnx: name of the quantizer, Quant for older tools
    batch: int = 1  # qonnx: samples at a time


def main(arguments: list[str]) -> None:
    """Read, export, write; print the size and the notes."""
    chosen = tyro.cli(Export, prog="mixbits export", args=arguments)
    # Here, so that --help works without the extra.
    from mixbits.export import hls4ml, onnx_qdq, qonnx, torchao

    if chosen.to != "qonnx" and (chosen.power_of_two or chosen.node != "IntQuant" or chosen.batch != 1):
        raise ValueError("--power-of-two, --node and --batch are for --to qonnx")
    if chosen.to != "onnx" and (chosen.runtime != "any" or chosen.smallest != 4):
        raise ValueError("--for and --smallest are for --to onnx")
    if chosen.to == "onnx":
        exported = onnx_qdq(_program(chosen.model), runtime=chosen.runtime, smallest=chosen.smallest)
    elif chosen.to == "torchao":
        exported = torchao(_program(chosen.model))
    else:
        rounded = (chosen.power_of_two or chosen.to == "hls4ml") and chosen.model.is_dir()
        network = network_of(chosen.model) if rounded else _program(chosen.model)
        if chosen.to == "hls4ml":
            exported = hls4ml(network)
        else:
            exported = qonnx(network, power_of_two=chosen.power_of_two, node=chosen.node, batch=chosen.batch)
    size = exported.write(chosen.out)
    sys.stdout.write(f"{chosen.out}: {size} bytes\n" + "".join(f"- {note}\n" for note in exported.notes))


def _program(path: Path) -> Program:
    """The packed model of a run, or in a file."""
    if path.is_dir() and not (path / "model.mixbits").exists():
        raise ValueError(f"{path} holds no model.mixbits; finish the run, or `mixbits lower --out {path}`")
    return read_program(path / "model.mixbits" if path.is_dir() else path)
