"""The choice of kernels by measurement, kept from one process to the next.

Estimates say which kernels of a layer are promising; what is fastest depends on the CPU. So the network runs
with each of them in turn, and every layer gets the one that took least time where it will run: between its
neighbours, with weights and inputs as cold as they leave them. All kernels give the same sums, so only the
speed changes.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mixbits
from mixbits.core.files import whole_file
from mixbits.core.program import Program
from mixbits.pack.bits import native_available
from mixbits.runtime.native import Native, check_native
from mixbits.runtime.plan import Choose, cheapest, make_plan

if TYPE_CHECKING or native_available():
    from mixbits import _native

CLOSE = 2.0  # kernels are promising up to this many times the lowest estimate
MOST = 4  # kernels of a layer that are measured
ROUNDS = 5  # in each of which every kernel has its turn, so that a disturbance hits all
REPEATS = 3  # runs of a turn

Measured = dict[str, float]  # kernel -> microseconds in the network
FORMAT, VERSION = "mixbits-kernels", 1


def tuned(program: Program, *, threads: int = 1) -> Choose:
    """A choice of the kernels that were fastest in this program; layers that it lacks get the estimate's.

    What is known of equal layers on this machine is taken from the file at :func:`cache_path`; what had to be
    measured is added to it.
    """
    check_native(threads)
    kept = read_cache(cache_path()).get(machine(threads), {})
    promising_of: dict[str, list[str]] = {}  # by what tells convolutions apart
    conv_of: dict[str, str] = {}  # by layer

    def note(conv: _native.Conv, layer: str, kernels: Sequence[str]) -> str:
        conv_of[layer] = key(conv)
        promising_of[key(conv)] = promising(conv, kernels)
        return cheapest(conv, layer, kernels)

    make_plan(program, choose=note)
    measured = {
        conv: kept[conv] for conv, names in promising_of.items() if set(kept.get(conv, ())) == set(names)
    }
    unknown = {conv: names for conv, names in promising_of.items() if len(names) > 1 and conv not in measured}
    if unknown:
        try:
            new = measure(program, unknown, conv_of, threads=threads)
        except ValueError as error:  # values of random inputs that are not numbers
            warnings.warn(f"kernels are chosen by their estimates, not measured: {error}", stacklevel=2)
        else:
            measured |= new
            add_to_cache(cache_path(), machine(threads), new)

    def choose(conv: _native.Conv, layer: str, kernels: Sequence[str]) -> str:
        microseconds = measured.get(key(conv))
        return (
            min(microseconds, key=microseconds.__getitem__)
            if microseconds
            else cheapest(conv, layer, kernels)
        )

    return choose


def promising(conv: _native.Conv, kernels: Sequence[str]) -> list[str]:
    """The kernels whose estimate is near the lowest, that one first."""
    cycles = {name: _native.kernel_cost(name, conv)[0] for name in kernels}
    ranked = sorted(cycles, key=cycles.__getitem__)
    return [name for name in ranked if cycles[name] <= CLOSE * cycles[ranked[0]]][:MOST]


def measure(
    program: Program,
    names: Mapping[str, Sequence[str]],
    conv_of: Mapping[str, str],
    *,
    threads: int,
) -> dict[str, Measured]:
    """Microseconds of the kernels ``names`` of each convolution, over all layers that are equal to it."""

    def ranked(rank: int) -> Choose:
        def choose(conv: _native.Conv, layer: str, kernels: Sequence[str]) -> str:
            mine = names.get(key(conv), ())
            return mine[rank] if rank < len(mine) else cheapest(conv, layer, kernels)

        return choose

    natives = [
        Native(program, threads=threads, choose=ranked(rank))
        for rank in range(max(len(mine) for mine in names.values()))
    ]
    x = np.random.default_rng(0).standard_normal((1, *program.input_shape)).astype(np.float32)
    least: dict[tuple[str, str], float] = {}  # layer, kernel
    for _ in range(ROUNDS):
        for rank, native in enumerate(natives):
            for ran, seconds in native.steps(x, REPEATS):
                layer = ran.names[0] if ran.macs else ""
                if rank < len(names.get(conv_of.get(layer, ""), ())):
                    pair = layer, ran.what
                    least[pair] = min(least.get(pair, seconds), seconds)
    found: dict[str, Measured] = {conv: dict.fromkeys(mine, 0.0) for conv, mine in names.items()}
    for (layer, kernel), seconds in least.items():
        found[conv_of[layer]][kernel] += 1e6 * seconds
    return found


# --- the file --------------------------------------------------------------------------------------------


def cache_path() -> Path:
    """Where choices are kept: ``mixbits/kernels.json`` in the user's folder for caches."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (folder if folder.is_absolute() else Path.home() / ".cache") / "mixbits" / "kernels.json"


def isa_level() -> str:
    """The instruction sets in use, as MIXBITS_ISA names them."""
    return os.environ.get("MIXBITS_ISA") or "native"


def machine(threads: int) -> str:
    """What measurements hold for."""
    return f"{_native.cpu_model()}; {isa_level()}; {threads} threads; mixbits {mixbits.__version__}"


def key(conv: _native.Conv) -> str:
    """All that tells one convolution from another."""
    names = (name for name in dir(conv) if not name.startswith("_"))
    return " ".join(f"{name}={getattr(conv, name)}" for name in names)


def read_cache(path: Path) -> dict[str, dict[str, Measured]]:
    """Measurements by machine and convolution; a file that cannot be read is none, and a warning says so."""
    try:
        return _parsed(path)
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: cannot be read ({error}); kernels are measured again", stacklevel=2)
        return {}


def _parsed(path: Path) -> dict[str, dict[str, Measured]]:
    """The same; ``ValueError`` where it is not such a file. One that is not there holds nothing."""
    if not path.exists():
        return {}
    entry: Any = json.loads(path.read_text(encoding="utf-8"))
    try:
        if (entry["format"], entry["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is {entry['format']} of version {entry['version']}")
        return {
            where: {
                conv: {name: float(us) for name, us in measured.items()} for conv, measured in convs.items()
            }
            for where, convs in entry["machines"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no {FORMAT} of version {VERSION}") from error


def add_to_cache(path: Path, where: str, new: Mapping[str, Measured]) -> None:
    """Put measurements beside those in the file, in one step; a warning says so if it cannot be written."""
    try:
        machines = _parsed(path)
    except (OSError, ValueError):
        machines = {}  # who read first has said so
    machines[where] = {**machines.get(where, {}), **new}
    content = {"format": FORMAT, "version": VERSION, "machines": machines}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        warnings.warn(
            f"{path}: the measured choice of kernels cannot be kept ({error}); each process measures anew",
            stacklevel=2,
        )
