"""The configuration for torchao: its own loader reads it, and its ``quantize_`` gives layers these widths."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from lowered import NETWORKS, lowered
from mixbits.core.grid import Uniform, level_count
from mixbits.core.program import Program
from mixbits.export import TorchaoConfig, torchao

with warnings.catch_warnings():  # of torchao's own imports
    warnings.simplefilter("ignore")
    from torchao.core.config import config_from_dict, config_to_dict
    from torchao.quantization import FqnToConfig, quantize_

# Sums of up to a few thousand products in float32, whose order may differ.
FLOAT32_SUM = 1e-4
# Convolutions, in groups too, linear layers, attention; every kind of grid.
NAMES = ("resnet20", "branches", "shuffled", "convnext", "perceptron", "windows")
each = pytest.mark.parametrize("name", NAMES)


def loaded(exported: TorchaoConfig, path: Path) -> FqnToConfig:
    exported.write(path)
    return config_from_dict(json.loads(path.read_text(encoding="utf-8")))


def expressible(program: Program) -> dict[str, int]:
    """Widths by module, told from the program in another way than the exporter's."""
    groups = {
        i.attrs["weight"]: i.attrs.get("groups", 1) for i in program.instructions if "weight" in i.attrs
    }
    return {
        name.removesuffix(".weight"): weight.grid.bits
        for name, weight in program.weights.items()
        if isinstance(weight.grid, Uniform)
        and weight.grid.spacing == 1
        and len(weight.shape) in (2, 4)
        and groups[name] == 1
        and name.endswith(".weight")
    }


@each
def test_torchaos_loader_reads_the_widths(name, tmp_path):
    program = lowered(name).program

    config = loaded(torchao(program), tmp_path / "torchao.json")

    widths = {module: f"torch.int{bits}" for module, bits in expressible(program).items()}
    assert {module: str(c.weight_dtype) for module, c in config.fqn_to_config.items()} == widths
    assert config_from_dict(config_to_dict(config)) == config


@each
def test_what_is_not_expressed_is_named(name):
    program = lowered(name).program

    notes = "\n".join(torchao(program).notes)

    left = [w for w in program.weights if w.removesuffix(".weight") not in expressible(program)]
    assert all(f"{weight} (" in notes for weight in left)
    assert all(f"{i.name} (" in notes for i in program.instructions if i.op == "quantize")


@each
def test_the_network_computes_with_weights_of_these_widths(name, tmp_path):
    case, (_, network) = lowered(name), NETWORKS[name]
    x, quantized, plain = torch.from_numpy(case.x), network().eval(), network().eval()
    plain.load_state_dict(quantized.state_dict())
    widths = expressible(case.program)

    quantize_(quantized, loaded(torchao(case.program), tmp_path / "torchao.json"), filter_fn=None)

    changed = {n for n, p in quantized.named_parameters() if type(p.data) is not torch.Tensor}
    assert changed == {f"{module}.weight" for module in widths}
    with torch.no_grad():
        for module, bits in widths.items():
            weight = quantized.get_submodule(module).weight
            half = level_count(bits) // 2
            assert -half <= weight.qdata.min() < weight.qdata.max() <= half - 1
            plain.get_submodule(module).weight.copy_(weight.dequantize())
        torch.testing.assert_close(quantized(x), plain(x), rtol=FLOAT32_SUM, atol=FLOAT32_SUM)


def test_a_network_that_torchao_cannot_express_is_an_error():
    program = lowered("perceptron").program
    bipolar = {
        name: type(weight)(
            weight.shape, Uniform(weight.grid.bits, signed=True, form="bipolar"), weight.packed
        )
        for name, weight in program.weights.items()
    }
    only = Program(program.input_shape, program.output, program.instructions, bipolar, program.constants)

    with pytest.raises(ValueError, match=r"none of this network's weights: .* bit signed bipolar"):
        torchao(only)
