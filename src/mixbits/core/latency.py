"""Latency as a cost: what was measured on one machine, layer by layer and pair of widths by pair."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from mixbits.core.cost import Amount, Lookup, Term
from mixbits.core.profile import Profile

FORMAT, VERSION = "mixbits-latency", 1
NS_PER_MS = 1_000_000


@dataclass(frozen=True)
class LayerTimes:
    """A layer at every pair of widths: ``[weight bits][activation bits]``."""

    name: str
    macs: int  # of one sample: tells a layer from another of the same name
    ns: tuple[tuple[int, ...], ...]  # of a batch, with all that runs along with the layer
    kernels: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times of a network's layers on one machine, of a whole batch, in nanoseconds.

    ``rest_ns`` is what a run takes beside its layers, whatever the widths. The latency at some widths is the
    sum of the layers' and of it.
    """

    network: str
    cpu: str
    isa: str  # instruction sets that kernels may use, as MIXBITS_ISA names them
    threads: int
    batch: int  # samples of a run
    tuned: bool  # whether kernels were chosen by measurement, and not by their estimates
    weight_bits: tuple[int, ...]  # rising, as are those of activations
    activation_bits: tuple[int, ...]
    layers: tuple[LayerTimes, ...]
    rest_ns: int
    mixbits: str  # version
    date: str
    file: str = ""  # where it was read, for messages

    def amount(self, profile: Profile) -> Amount:
        """The latency in milliseconds as a sum over layers; ``ValueError`` for another network."""
        known = {layer.name: layer for layer in self.layers}
        terms: list[Term | Lookup] = [Term((), self.rest_ns)]
        for op in profile.ops:
            if op.name not in known:
                raise ValueError(
                    f"{op.name}: the latency table {self.file} has no such layer; it was measured for "
                    f"{self.network}. Measure this network with `mixbits profile ... --latency`."
                )
            layer = known[op.name]
            if layer.macs != op.macs:
                raise ValueError(
                    f"{op.name}: the layer has {op.macs} MACs, that of the latency table {self.file} "
                    f"{layer.macs}: it was measured for another network or input size ({self.network}). "
                    "Measure this one with `mixbits profile ... --latency`."
                )
            widths = (self.weight_bits, self.activation_bits)
            terms.append(Lookup((op.weight, op.input), widths, layer.ns))
        return Amount((tuple(terms),), divisor=NS_PER_MS)

    def check(self, profile: Profile, widths: Mapping[str, Sequence[int]]) -> None:
        """Raise ``ValueError`` unless every pair of ``widths`` was measured, naming the layer."""
        self.amount(profile)
        for op in profile.ops:
            for weight in widths[op.weight]:
                for activation in widths[op.input]:
                    if weight not in self.weight_bits or activation not in self.activation_bits:
                        raise ValueError(
                            f"{op.name}: the latency table {self.file} has no time for {weight}-bit weights "
                            f"with {activation}-bit inputs; it has weights of "
                            f"{_listed(self.weight_bits)} and inputs of {_listed(self.activation_bits)} "
                            "bits. Measure with these candidates, or leave those widths out."
                        )

    def check_machine(self, cpu: str, isa: str, cores: int) -> None:
        """Raise ``ValueError`` if the table was not measured on such a machine."""
        for what, measured, here in (("CPU", self.cpu, cpu), ("level of instructions", self.isa, isa)):
            if measured != here:
                raise ValueError(
                    f"the latency table {self.file} holds for the {what} {measured!r}, this is {here!r}. "
                    "Measure here, or give --latency-elsewhere if the network is to run there."
                )
        if self.threads > cores:
            raise ValueError(
                f"the latency table {self.file} holds for {self.threads} threads, this process may use "
                f"{cores} cores. Measure with fewer threads, or give --latency-elsewhere if the network is "
                "to run there."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read back by :func:`read_latency`."""
        entry = asdict(self)
        del entry["file"]
        return {"format": FORMAT, "version": VERSION, **entry}


def read_latency(path: Path) -> LatencyTable:
    """The table in a JSON file that ``mixbits profile --latency`` wrote; errors name the file."""
    remedy = "Write one with `mixbits profile ... --latency`."
    try:
        entry: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no latency table {path}. {remedy}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a latency table ({error}). {remedy}") from None
    fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    if fields.pop("format", None) != FORMAT or fields.pop("version", None) != VERSION:
        raise ValueError(f"{path}: not a {FORMAT} of version {VERSION}. {remedy}")
    try:
        layers = tuple(
            LayerTimes(
                row["name"],
                int(row["macs"]),
                tuple(tuple(int(ns) for ns in line) for line in row["ns"]),
                tuple(tuple(line) for line in row["kernels"]),
            )
            for row in fields.pop("layers")
        )
        weights, activations = (
            tuple(int(bits) for bits in fields.pop(key)) for key in ("weight_bits", "activation_bits")
        )
        threads, batch, rest_ns = (int(fields.pop(key)) for key in ("threads", "batch", "rest_ns"))
        table = LatencyTable(
            **fields,
            threads=threads,
            batch=batch,
            weight_bits=weights,
            activation_bits=activations,
            layers=layers,
            rest_ns=rest_ns,
            file=str(path),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the latency table is damaged ({error}). {remedy}") from None
    shape = [len(table.activation_bits)] * len(table.weight_bits)
    for layer in table.layers:
        if [len(line) for line in layer.ns] != shape:
            raise ValueError(f"{path}: the times of {layer.name} are not one a pair of widths. {remedy}")
    return table


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))
