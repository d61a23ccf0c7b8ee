"""The native engine beside today's int8 runtimes: milliseconds of a batch, taken in turns in one run.

Every contender is pinned to the same cores and the others wait while one runs. A round gives each a turn; a turn's
result is its fastest run, the table's the fastest of all rounds. Weights are random, batch norms are estimated on noise,
steps are those of least squared error, so that codes are spread over all levels. First layer and classifier have 8 bits,
all others the widths of the row; the peers run 8 bits throughout. Before it is timed, each program's output is compared
with the reference's, bit for bit. A section is added to ``benchmarks/results/engine_<date>.md``.

    python -m venv PEERS && PEERS/bin/pip install -r benchmarks/engine_peers.txt
    python benchmarks/engine.py --python PEERS/bin/python resnet18 resnet20 mobilenet_v2 linear4096 linear16384

ResNet-20 has 1x1 convolutions as shortcuts, so that no peer has to quantize padded channels. LiteRT reads int8 with
channels last, all others float32. With ``--isa avx2`` mixbits and OpenVINO keep to AVX2, for which we know no switch of
the others. On a busy machine, ``--clock processor`` gives nearly the figures of a quiet one; steps are always wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_peers import CLOCKS, PEERS, fastest
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mixbits
from mixbits import zoo
from mixbits.core.policy import Policy
from mixbits.core.profile import Profile
from mixbits.fit.summary import processor
from mixbits.graph.quant_graph import QuantGraph
from mixbits.lower import lower
from mixbits.runtime import Executor
from mixbits.train.finetune import place_policy
from mixbits.train.method import full_grid
from mixbits.train.norms import reestimate_batch_norm_
from mixbits.train.task import LoaderBatches
from mixbits.zoo.resnet_cifar import ResNet

CPU = torch.device("cpu")
HERE = Path(__file__).parent
INT8 = ("onnxruntime", "openvino", "litert", "inductor")
PAIRS = ("1x1", "1x2", "2x2", "3x3", "2x4", "4x4", "mixed", "8x8")  # weights x activations
MIXED = (1, 2, 3, 4)  # widths that a mixed policy draws from, each site by itself
MIXED_SEED = 2  # means between 2 and 3 bits in ResNet-18 and ResNet-20, for weights and activations
BATCHES = 4  # of noise, for statistics and steps
STEP_REPEATS = 30  # runs of each step for the table of steps


def resnet20() -> nn.Module:
    """ResNet-20 for 32 x 32 images with 1x1 convolutions as shortcuts."""
    return ResNet((3, 3, 3), (16, 32, 64), pad_shortcuts=False, num_classes=10)


# Network, input shape, default pairs of widths, peers.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...], tuple[str, ...]]] = {
    "resnet18": (zoo.resnet18_imagenet, (3, 224, 224), PAIRS, INT8),
    "resnet20": (resnet20, (3, 32, 32), ("1x1", "2x2", "4x4", "8x8"), INT8),
    "mobilenet_v2": (zoo.mobilenet_v2, (3, 224, 224), ("4x4", "8x8"), INT8),
    "linear4096": (partial(nn.Linear, 4096, 4096), (4096,), ("2x8",), ("matmulnbits", "matmulnbits-tables")),
    "linear16384": (
        partial(nn.Linear, 8192, 16384),
        (8192,),
        ("2x8",),
        ("matmulnbits", "matmulnbits-tables"),
    ),
}


# --- ours ------------------------------------------------------------------------------------------------------------


def noise(batch: int, shape: Sequence[int]) -> LoaderBatches:
    """Batches of normal noise."""
    images = torch.randn(BATCHES * batch, *shape, generator=torch.Generator().manual_seed(0))
    return LoaderBatches(DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=batch))


def float_network(name: str) -> QuantGraph:
    """The network of a name, captured, with batch-norm statistics of noise."""
    make, shape, _, _ = NETWORKS[name]
    torch.manual_seed(0)
    graph = mixbits.capture(make().eval(), torch.zeros(2, *shape))
    reestimate_batch_norm_(graph, noise(2, shape), BATCHES, CPU)
    return graph


def policy(profile: Profile, pair: str) -> Policy:
    """``2x4``: weights of 2, activations of 4 bits, or mixed; 8 bits in the first layer and the last, if not the same."""
    ends = [profile.ops[0], profile.ops[-1]] if len(profile.ops) > 1 else []
    eight = {site for op in ends for site in (op.weight, op.input)}
    draw = np.random.default_rng(MIXED_SEED)
    grids = {}
    for site in profile.sites:
        bits = int(draw.choice(MIXED) if pair == "mixed" else pair.split("x")[site.kind == "activation"])
        grids[site.name] = full_grid(site, 8 if site.name in eight else bits)
    return Policy(grids)


def mean_bits(profile: Profile, policy: Policy) -> str:
    """Average widths, by elements: weights x activations."""
    means = (
        sum(site.elements * policy.grids[site.name].bits for site in sites)
        / sum(site.elements for site in sites)
        for sites in (profile.weights, profile.activations)
    )
    return " x ".join(f"{mean:.2f}" for mean in means)


def executor(graph: QuantGraph, policy: Policy, threads: int) -> Executor:
    """The network at these widths on the native engine, once it was seen to equal the reference."""
    shape = graph.profile.input_shape
    placed = place_policy(graph, policy, noise(2, shape))
    reestimate_batch_norm_(placed, noise(2, shape), BATCHES, CPU)
    program = lower(placed)
    native = Executor(program, threads=threads, engine="native")
    x = np.random.default_rng(1).standard_normal((1, *shape)).astype(np.float32)
    if not np.array_equal(native(x), Executor(program, engine="reference")(x)):
        raise SystemExit("the native engine's output is not the reference's")
    return native


# --- peers -----------------------------------------------------------------------------------------------------------


def build(name: str, graph: QuantGraph, batch: int, folder: Path) -> None:
    """What the peers make their models of."""
    folder.mkdir(parents=True)
    shape = graph.profile.input_shape
    images = np.stack([x.numpy() for x, _ in noise(batch, shape).epoch(0)])
    np.save(folder / "images.npy", images)
    if name.startswith("linear"):
        op = graph.profile.ops[0]
        (folder / "shape.txt").write_text(f"{op.channels} {op.reduction}")
    else:
        exported = torch.export.export(graph.module, (torch.from_numpy(images[0]),))
        torch.export.save(exported, folder / "network.pt2")


def command(chosen: argparse.Namespace, what: str, peer: str, folder: Path) -> list[str]:
    words = (chosen.python, HERE / "engine_peers.py", what, peer, folder)
    return [*map(str, words), "--threads", str(chosen.threads), "--clock", chosen.clock]


@contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[str, Callable[[float], float]]]:
    """A peer in a process of its own: what it is, and a function of seconds that gives milliseconds."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        inputs, answers = process.stdin, process.stdout

        def answer() -> Any:
            line = answers.readline()
            if not line:
                raise SystemExit(f"a peer ended: {shlex.join(command)}")
            return json.loads(line)

        def turn(seconds: float) -> float:
            inputs.write(f"{seconds}\n")
            inputs.flush()
            return answer()

        yield answer(), turn


# --- both ------------------------------------------------------------------------------------------------------------


def compare(name: str, peers: Sequence[str], chosen: argparse.Namespace) -> str:
    """The table of one network and the steps of its programs, as Markdown."""
    _, shape, pairs, _ = NETWORKS[name]
    graph = float_network(name)
    folder = chosen.models / f"{name}_b{chosen.batch}"
    if not folder.exists():
        build(name, graph, chosen.batch, folder)
    for peer in peers:
        if not (folder / PEERS[peer][1]).exists():
            say(f"{name}: making the model of {peer}")
            subprocess.run(command(chosen, "build", peer, folder), check=True)
    engines: dict[str, Executor] = {}
    for pair in chosen.widths or pairs:
        say(f"{name}: {pair}, checking against the reference")
        widths = policy(graph.profile, pair)
        label = f"mixed, {mean_bits(graph.profile, widths)}" if pair == "mixed" else pair
        engines[f"mixbits {label}"] = executor(graph, widths, chosen.threads)
    x = np.random.default_rng(1).standard_normal((chosen.batch, *shape)).astype(np.float32)
    with ExitStack() as stack:
        turns: dict[str, Callable[[float], float]] = {}
        for peer in peers:
            label, turn = stack.enter_context(serving(command(chosen, "serve", peer, folder)))
            turns[label] = turn
        rivals = list(turns)
        for label, engine in engines.items():
            turns[label] = partial(fastest, partial(engine, x), chosen.clock)
        rounds: dict[str, list[float]] = {label: [] for label in turns}
        for number in range(chosen.rounds):
            say(f"{name}: round {number + 1} of {chosen.rounds}")
            order = list(turns)
            for label in order[number % len(order) :] + order[: number % len(order)]:
                rounds[label].append(turns[label](chosen.seconds))
    return "\n".join([*table(rounds, rivals), "", *(steps(label, engines[label], x) for label in engines)])


def table(rounds: Mapping[str, Sequence[float]], rivals: Sequence[str]) -> list[str]:
    """Every contender's milliseconds, and how many times as long the first and the fastest peer take."""
    least = {label: min(values) for label, values in rounds.items()}
    quickest = min(rivals, key=lambda label: least[label])
    rows = [
        f"| | ms | slowest round, ms | {rivals[0]} takes | fastest peer, {quickest}, takes |",
        "|---|---|---|---|---|",
    ]
    for label, values in rounds.items():
        ratios = " | ".join(f"{least[rival] / least[label]:.2f}x" for rival in (rivals[0], quickest))
        rows.append(f"| {label} | {least[label]:.3f} | {max(values):.3f} | {ratios} |")
    return rows


def steps(label: str, engine: Executor, x: Any) -> str:
    """The engine's steps for one sample, each with its fastest run."""
    assert engine.native is not None
    micros = [1e6 * seconds for seconds in engine.native.time(x, STEP_REPEATS)]
    rows = [
        f"<details><summary>{label}: steps, sum {sum(micros) / 1e3:.3f} ms</summary>",
        "",
        "| step | kernel | weights x input | us | share | GMAC/s |",
        "|---|---|---|---|---|---|",
    ]
    for ran, time_us in zip(engine.native.plan.ran, micros, strict=True):
        widths = f"{ran.weight_bits}x{ran.input_bits}" if ran.macs else ""
        speed = f"{ran.macs / time_us / 1e3:.1f}" if ran.macs else ""
        share = f"{100 * time_us / sum(micros):.1f} %"
        rows.append(
            f"| {' + '.join(dict.fromkeys(ran.names))} | {ran.what} | {widths} | {time_us:.1f} | {share} | {speed} |"
        )
    return "\n".join([*rows, "", "</details>", ""])


def heading(name: str, cores: Sequence[int], load: float, chosen: argparse.Namespace) -> str:
    """What was compared, by which command, on what; ``load`` is the load average before."""
    words = ["PEERS/bin/python" if word == str(chosen.python) else word for word in sys.argv[1:]]
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()
    threads = "1 thread" if chosen.threads == 1 else f"{chosen.threads} threads"
    asked = shlex.join(["python", "benchmarks/engine.py", *words])
    return (
        f"## {name}, batch {chosen.batch}, {threads}, {chosen.isa} instructions\n\n"
        f"Command: `{asked}`\n\n"
        f"{processor()}, {os.cpu_count()} cores, pinned to {', '.join(map(str, cores))}; load average before {load:.1f}, "
        f"after {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, commit {commit}, "
        f"{time.strftime('%Y-%m-%d %H:%M')}; n = {chosen.rounds} rounds of {chosen.seconds} s a contender, "
        f"{chosen.clock} time.\n"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run and add a section to the day's page."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("networks", nargs="+", choices=NETWORKS)
    options.add_argument("--python", type=Path, required=True, help="the peers' interpreter")
    options.add_argument("--widths", nargs="+", help="pairs such as 2x4, or mixed")
    options.add_argument("--peers", nargs="+", choices=PEERS)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--isa", choices=["native", "avx2"], default="native")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=0.3, help="of a turn")
    options.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: on a busy machine, for 1 thread"
    )
    options.add_argument("--models", type=Path, default=Path("runs/engine"), help="the peers' models, kept")
    options.add_argument("--out", type=Path, help="the page")
    chosen = options.parse_args()
    os.environ["MIXBITS_ISA"] = chosen.isa
    os.environ.pop("ONEDNN_MAX_CPU_ISA", None)
    if chosen.isa != "native":
        os.environ["ONEDNN_MAX_CPU_ISA"] = chosen.isa.upper()  # OpenVINO's
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # the peers'
    if chosen.clock == "processor" and chosen.threads > 1:
        options.error("processor time adds up that of threads: use --clock wall")
    cores = sorted(os.sched_getaffinity(0))[-chosen.threads :]
    if len(cores) < chosen.threads:
        options.error(f"{chosen.threads} threads do not fit {len(cores)} cores")
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(chosen.threads)
    out = chosen.out or HERE / "results" / f"engine_{time.strftime('%Y-%m-%d')}.md"
    for name in chosen.networks:
        began = os.getloadavg()[0]
        peers = [peer for peer in chosen.peers or NETWORKS[name][3] if peer in NETWORKS[name][3]]
        if chosen.isa != "native":
            peers = [peer for peer in peers if peer == "openvino"]
        if not peers:
            options.error(f"{name}: no peer is left to compare with")
        body = compare(name, peers, chosen)
        page = (
            out.read_text(encoding="utf-8") if out.exists() else "# The native engine beside int8 runtimes\n"
        )
        page += f"\n{heading(name, cores, began, chosen)}\n{body}"
        out.write_text(page, encoding="utf-8")
        say(f"{name}: added to {out}")


if __name__ == "__main__":
    main()
