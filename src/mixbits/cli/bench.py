"""``mixbits bench kernels``: every kernel that can run here beside the ceiling of its instructions."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import tyro

from mixbits.core.grid import Uniform
from mixbits.pack.bits import native_available
from mixbits.runtime.ceilings import ceiling
from mixbits.runtime.kernels import convolution
from mixbits.runtime.native import check_native
from mixbits.runtime.tune import isa_level

if native_available():
    from mixbits import _native

MOST_CHANNELS = 1 << 20  # of a call: all
RUNS = 3  # of a kernel's turn


@dataclass(frozen=True)
class Layer:
    """A square convolution, padded so that stride 1 keeps its size."""

    name: str
    channels: int
    outputs: int
    size: int  # height and width of the input
    kernel: int = 3
    stride: int = 1
    groups: int = 1


LAYERS = (
    Layer("64x56x56", 64, 64, 56),
    Layer("128x28x28", 128, 128, 28),
    Layer("256x14x14", 256, 256, 14),
    Layer("512x7x7", 512, 512, 7),
    Layer("64-128 /2", 64, 128, 56, stride=2),
    Layer("128-256 /2", 128, 256, 28, stride=2),
    Layer("256-512 /2", 256, 512, 14, stride=2),
    Layer("64-128 1x1/2", 64, 128, 56, kernel=1, stride=2),
    Layer("256-512 1x1/2", 256, 512, 14, kernel=1, stride=2),
    Layer("256x14x14 1x1", 256, 256, 14, kernel=1),
    Layer("16x32x32", 16, 16, 32),
    Layer("32x16x16", 32, 32, 16),
    Layer("64x8x8", 64, 64, 8),
    Layer("3-64 7x7/2", 3, 64, 224, kernel=7, stride=2),
    Layer("144x56x56 each", 144, 144, 56, groups=144),
    Layer("512-1000", 512, 1000, 1, kernel=1),
    Layer("4096-4096", 4096, 4096, 1, kernel=1),
)


@dataclass(frozen=True)
class BenchKernels:
    """Time every kernel that can run here, weights and input warm, one thread.

    A round gives each kernel of a layer its turn; the least time of all rounds counts. The ceiling is what
    the instructions of a kernel's inner loop reach from registers, measured here. MACs on padding count.
    """

    pairs: tuple[str, ...] = (
        "1x1",
        "1x2",
        "2x1",
        "2x2",
        "2x4",
        "4x4",
        "8x8",
    )  # weight bits x activation bits
    layers: tuple[str, ...] = ()  # parts of names; default: all
    kernels: tuple[str, ...] = ()  # parts of names; default: all but those in plain C++
    rounds: int = 15


def main(arguments: list[str]) -> None:
    """Print a table, a row a layer, pair and kernel."""
    if not arguments or arguments[0] not in ("kernels", "-h", "--help"):
        raise ValueError("what is to be measured? `mixbits bench kernels` measures kernels")
    rest = arguments[1:] if arguments[0] == "kernels" else arguments
    chosen = tyro.cli(BenchKernels, prog="mixbits bench kernels", args=rest)
    check_native(1)
    usable = [name for name, can, _ in _native.kernels() if can]
    wanted = chosen.kernels or [name for name in usable if not name.endswith("_portable")]
    names = [name for name in usable if any(part in name for part in wanted)]
    sys.stdout.write(
        f"{_native.cpu_model()}, MIXBITS_ISA={isa_level()}, {time.strftime('%Y-%m-%d')}, least of "
        f"{chosen.rounds * RUNS} runs, weights bipolar, inputs unsigned\n\n"
        "| layer | bits | kernel | us | GMAC/s | of its ceiling | its estimate, cycles |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for layer in LAYERS:
        if chosen.layers and not any(part in layer.name for part in chosen.layers):
            continue
        for pair in chosen.pairs:
            _rows(layer, pair, names, chosen.rounds)


def _rows(layer: Layer, pair: str, names: list[str], rounds: int) -> None:
    w_bits, _, a_bits = pair.partition("x")
    if not (w_bits.isdigit() and a_bits.isdigit()):
        raise ValueError(
            f"cannot read the pair {pair!r}; write weight bits x activation bits, for example 2x4"
        )
    weight_grid, input_grid = Uniform(int(w_bits), True, "bipolar"), Uniform(int(a_bits), False)
    shape = (layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel)
    conv = convolution(
        shape,
        weight_grid,
        input_grid,
        size=(layer.size, layer.size),
        stride=(layer.stride, layer.stride),
        padding=((layer.kernel // 2,) * 2,) * 2,
        groups=layer.groups,
    )
    rng = np.random.default_rng(0)
    levels = rng.choice(np.array(weight_grid.levels, np.int16), shape)
    pixels = np.zeros((conv.in_h, conv.in_w, conv.pixel_stride), np.uint8)
    pixels[..., : layer.channels] = rng.integers(
        0, len(input_grid.levels), (conv.in_h, conv.in_w, layer.channels)
    )
    able = [name for name in names if not _native.refuses(name, conv)]
    costs = {name: _native.kernel_cost(name, conv) for name in able}
    least = dict.fromkeys(able, float("inf"))
    for _ in range(rounds):
        for name in able:
            rows = costs[name][1]
            taken = _native.time_kernel(name, conv, pixels, levels, rows, MOST_CHANNELS, RUNS)
            least[name] = min(least[name], *taken)
    macs = conv.out_h * conv.out_w * layer.outputs * shape[1] * layer.kernel**2
    for name in sorted(able, key=least.__getitem__):
        most = ceiling(name, conv)
        share = "-" if most is None else f"{100 * macs / least[name] / most:.0f} %"
        sys.stdout.write(
            f"| {layer.name} | {pair} | {name} | {1e6 * least[name]:.1f} | {macs / least[name] / 1e9:.1f} "
            f"| {share} | {costs[name][0]:.0f} |\n"
        )
        sys.stdout.flush()
