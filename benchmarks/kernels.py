"""MAC per cycle of every kernel that takes a layer, beside what its instructions allow.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py --pairs 1x1 1x2 2x1 2x2 2x4 4x4

One thread, one image, weights and input warm in cache. A round times every kernel of a layer once, in turn, so
that a disturbance hits all; the minimum of all rounds is printed. MACs are counted with those on padding.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np

from mixbits import _native
from mixbits.core.grid import Uniform
from mixbits.fit.summary import machine
from mixbits.runtime.kernels import convolution

GHZ = 3.69  # of the machine that recorded results: a chain of dependent multiplications


@dataclass(frozen=True)
class Layer:
    """A square convolution, padded so that stride 1 keeps its size."""

    name: str
    channels: int
    outputs: int
    size: int  # height and width of the input
    kernel: int = 3
    stride: int = 1

    @property
    def padding(self) -> int:
        """Pixels on every side."""
        return self.kernel // 2


LAYERS = [
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
]


def ceiling(kernel: str, w_bits: int, a_bits: int) -> float | None:
    """MAC per cycle that the kernel's instructions allow where two 512-bit operations start a cycle; None if unknown."""
    if kernel == "bitplanes_avx512popcnt":  # AND, population count, addition for 512 products of bits
        return 512 / 1.5 / (w_bits * a_bits)
    return None


def main() -> None:
    """Print a table, a row a kernel and layer."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pairs", nargs="+", default=["1x1", "1x2", "2x1", "2x2", "2x4", "4x4"])
    options.add_argument("--kernels", nargs="+", help="parts of names; default: all but the portable ones")
    options.add_argument("--layers", nargs="+", help="parts of names")
    options.add_argument("--rounds", type=int, default=41)
    options.add_argument("--ghz", type=float, default=GHZ)
    chosen = options.parse_args()
    print(
        f"machine: {machine()}; date: {time.strftime('%Y-%m-%d')}; minimum of {chosen.rounds}; {chosen.ghz} GHz\n"
    )
    print("| layer | pair | kernel | us | MAC/cycle | of its ceiling, % | its estimate, us |")
    print("|---|---|---|---|---|---|---|")
    names = [name for name, usable, _ in _native.kernels() if usable]
    wanted = chosen.kernels or [name for name in names if not name.endswith("_portable")]
    names = [name for name in names if any(part in name for part in wanted)]
    for layer in LAYERS:
        if chosen.layers and not any(part in layer.name for part in chosen.layers):
            continue
        for pair in chosen.pairs:
            row(layer, pair, names, rounds=chosen.rounds, ghz=chosen.ghz)


def row(layer: Layer, pair: str, names: list[str], *, rounds: int, ghz: float) -> None:
    """Time the kernels that take the layer at a pair of widths, weights bipolar and inputs unsigned."""
    w_bits, a_bits = map(int, pair.split("x"))
    rng = np.random.default_rng(0)
    weight_grid, input_grid = Uniform(w_bits, True, "bipolar"), Uniform(a_bits, False)
    weight_shape = (layer.outputs, layer.channels, layer.kernel, layer.kernel)
    conv = convolution(
        weight_shape,
        weight_grid,
        input_grid,
        size=(layer.size, layer.size),
        stride=(layer.stride, layer.stride),
        padding=((layer.padding, layer.padding),) * 2,
    )
    levels = rng.choice(np.array(weight_grid.levels, np.int16), weight_shape)
    pixels = rng.integers(0, 1 << a_bits, (conv.in_h, conv.in_w, conv.pixel_stride)).astype(np.uint8)
    macs = conv.out_h * conv.out_w * layer.outputs * layer.channels * layer.kernel**2
    names = [name for name in names if not _native.refuses(name, conv)]
    costs = {name: _native.kernel_cost(name, conv) for name in names}
    best = dict.fromkeys(names, float("inf"))
    for _ in range(rounds):
        for name in names:
            _, rows, _ = costs[name]
            best[name] = min(best[name], *_native.time_kernel(name, conv, pixels, levels, rows, 4096, 3))
    for name in names:
        rate = macs / (best[name] * ghz * 1e9)
        limit = ceiling(name, w_bits, a_bits)
        share = f"{100 * rate / limit:.0f}" if limit else "-"
        print(
            f"| {layer.name} | {pair} | {name} | {best[name] * 1e6:.1f} | {rate:.1f} | {share} "
            f"| {costs[name][0] / ghz / 1e3:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
