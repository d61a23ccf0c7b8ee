"""Time of the integer program: layers of five widths for weights and activations each, under three limits and more.

Every problem is solved to the proved optimum by ``least_harm`` (the median processor time of ``--runs``), and
once by branch and cut alone, the fallback. Harm is ``sensitivity * 4**-bits`` with sensitivities that are
lognormal, equal or of a few levels; limits are those of 3.6 bit for weights, 4 for activations, 14 for their
product, and in between for others.

    OMP_NUM_THREADS=1 python benchmarks/integer_program.py --runs 3 --nodes 1000
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import numpy as np

from mixbits.core.budget import Budget, Limit
from mixbits.core.cost import COSTS
from mixbits.core.profile import Op, Profile, Site, Value
from mixbits.fit.summary import machine
from mixbits.search import ilp
from mixbits.search.greedy import Choices, choices

WIDTHS = (2, 3, 4, 6, 8)
# Of the way from the lowest to the highest cost.
SHARES = {"weights": 1.6 / 6, "act_sum": 2 / 6, "bops": 10 / 60, "act_max": 0.5, "act_peak": 0.5}
THREE = ("weights", "act_sum", "bops")


def chain(count: int, draw: np.random.Generator, *, alike: bool = False) -> Profile:
    """Layers of random sizes; ``alike``: blocks of six of a transformer, 768 wide, 196 tokens."""
    sites, ops, values = [], [], []
    for index in range(count):
        n, a, macs = (
            int(draw.integers(1000, 500_000)),
            int(draw.integers(1000, 500_000)),
            int(draw.integers(10**6, 10**8)),
        )
        if alike:
            n = 768 * 768 * (4 if index % 6 >= 4 else 1)
            a, macs = 768 * 196 * (4 if index % 6 == 5 else 1), n * 196
        name, weight, read = f"o{index}", f"w{index}", f"a{index}"
        sites += [Site(weight, "weight", (n,), True, (name,)), Site(read, "activation", (a,), False, (name,))]
        ops.append(Op(name, "linear", macs, weight, read, 1, 1))
        values.append(Value(read, a, read, index, index + 1))
    return Profile((1,), tuple(sites), tuple(ops), tuple(values), 0)


def resnet18() -> Profile:
    """ResNet-18 for 32 x 32 images; an activation before a downsampling block is read twice."""
    sites = [Site("input", "activation", (3, 32, 32), True, ())]
    ops, values = [], [Value("input", 3072, "input", 0, 0)]

    def layer(name: str, read: str, shape: tuple[int, int, int], size: int) -> None:
        count = shape[0] * shape[1] * shape[2] ** 2
        sites.append(Site(f"{name}.weight", "weight", (count,), True, (name,)))
        ops.append(Op(name, "conv2d", count * size**2, f"{name}.weight", read, shape[0], 1))

    def activation(name: str, channels: int, size: int) -> str:
        sites.append(Site(name, "activation", (channels, size, size), False, ()))
        values.append(Value(name, channels * size**2, name, len(values), len(values) + 2))
        return name

    layer("conv1", "input", (64, 3, 3), 32)
    read, before, size = activation("relu", 64, 32), 64, 32
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            name, down = f"{stage}.{block}", stage > 0 and block == 0
            size //= 2 if down else 1
            layer(f"{name}.conv1", read, (width, before, 3), size)
            layer(f"{name}.conv2", activation(f"{name}.relu1", width, size), (width, width, 3), size)
            if down:
                layer(f"{name}.down", read, (width, before, 1), size)
            read, before = activation(f"{name}.relu2", width, size), width
    layer("fc", read, (10, 512, 1), 1)
    return Profile((3, 32, 32), tuple(sites), tuple(ops), tuple(values), 0)


def harm_of(profile: Profile, draw: np.random.Generator, kind: str) -> dict[str, dict[int, float]]:
    """``sensitivity * 4**-bits`` of every site."""
    harm = {}
    for site in profile.sites:
        sensitivity = float(draw.lognormal(0, 2))
        sensitivity = {"lognormal": sensitivity, "equal": 1.0, "levels": round(sensitivity) + 1.0}[kind]
        harm[site.name] = {width: sensitivity * 4.0**-width for width in WIDTHS}
    return harm


def budget_of(profile: Profile, names: tuple[str, ...], allowed: Choices) -> Budget:
    """Limits at ``SHARES`` of the way from the lowest to the highest cost."""
    limits = []
    for name in names:
        low, high = (COSTS[name].of(profile, allowed.at(lowest=lowest)) for lowest in (True, False))
        limits.append(Limit(name, low + SHARES[name] * (high - low), name))
    return Budget(tuple(limits))


def solve(problem: tuple) -> tuple[float, float, str]:
    """Processor seconds, harm, and how much is not proved."""
    profile, budget, _, harm = problem
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        began = time.process_time()
        bits = ilp.least_harm(*problem)
        seconds = time.process_time() - began
    assert budget.fits(profile, bits)
    unproved = [str(entry.message).rpartition(" (")[2].rstrip(")") for entry in caught]
    return seconds, sum(table[bits[site]] for site, table in harm.items()), " ".join(unproved) or "0"


def main() -> None:
    """Run the table and print it as Markdown."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--seeds", type=int, default=20)
    options.add_argument("--nodes", type=int, default=ilp.MOST_NODES)
    chosen = options.parse_args()
    ilp.MOST_NODES = chosen.nodes
    print(
        f"machine: {machine()}; date: {time.strftime('%Y-%m-%d')}; n: {chosen.runs}; nodes: {chosen.nodes}\n"
    )
    print(
        "| problem | limits | s, median (min) | gap | branch and cut alone, s | gap | times | harm less by |"
    )
    print("|---|---|---|---|---|---|---|---|")
    cases = [("400 random layers", 400, False, "lognormal", THREE)] * 4
    cases += [("400 random layers", 400, False, kind, THREE) for kind in ("levels", "equal")]
    cases += [("72 random layers", 72, False, kind, THREE) for kind in ("lognormal", "levels", "equal")]
    cases += [
        ("72 random layers", 72, False, "lognormal", (*THREE, extra)) for extra in ("act_max", "act_peak")
    ]
    cases += [("72 layers, transformer", 72, True, kind, THREE) for kind in ("lognormal", "levels", "equal")]
    cases += [("ResNet-18", 0, False, kind, THREE) for kind in ("lognormal", "equal")]
    cases += [("ResNet-18", 0, False, "lognormal", (*THREE, "act_max", "act_peak"))]
    for number, (name, count, alike, kind, limits) in enumerate(cases):
        draw = np.random.default_rng(number)
        profile = chain(count, draw, alike=alike) if count else resnet18()
        allowed = choices(profile, WIDTHS, WIDTHS)
        problem = (profile, budget_of(profile, limits, allowed), allowed, harm_of(profile, draw, kind))
        results = [solve(problem) for _ in range(chosen.runs)]
        seconds = [result[0] for result in results]
        most, ilp.MOST_OPTIONS = ilp.MOST_OPTIONS, 0  # so that every class has too many options
        other = solve(problem)
        ilp.MOST_OPTIONS = most
        median = statistics.median(seconds)
        print(
            f"| {name}, {kind} | {', '.join(limits)} | {median:.2f} ({min(seconds):.2f}) | {results[0][2]} | "
            f"{other[0]:.2f} | {other[2]} | {other[0] / median:.1f} | {other[1] - results[0][1]:.1e} |",
            flush=True,
        )
    seconds = []
    for number in range(100, 100 + chosen.seeds):
        draw = np.random.default_rng(number)
        profile = chain(400, draw)
        allowed = choices(profile, WIDTHS, WIDTHS)
        harm = harm_of(profile, draw, "lognormal")
        taken, _, gap = solve((profile, budget_of(profile, THREE, allowed), allowed, harm))
        seconds.append(taken if gap == "0" else float("inf"))
    print(
        f"\n400 random layers, lognormal, {chosen.seeds} seeds once each: median {statistics.median(seconds):.2f} s, "
        f"largest {max(seconds):.2f} s, below 2 s in {sum(s < 2 for s in seconds)}"
    )


if __name__ == "__main__":
    main()
