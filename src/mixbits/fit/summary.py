"""Summary: the JSON that says what a run asked for, what it assigned, what it stored and what it reached."""

from __future__ import annotations

import platform
from math import prod
from pathlib import Path
from typing import Any

import torch

import mixbits
from mixbits.core.check import specs
from mixbits.core.grid import describe
from mixbits.core.infer import accumulator_bound
from mixbits.core.program import Program
from mixbits.fit.recipe import method_of
from mixbits.fit.stages import Run, run_policy
from mixbits.pack.artifact import read_program


def write_summary(run: Run) -> dict[str, Any]:
    """Collect the results of all stages into ``summary.json``."""
    recipe, mixed = run.recipe, run.result("finetune")
    uniform = run.result("uniform") if run.done("uniform") else None
    program = read_program(run.folder / "model.mixbits")
    summary = {
        "format": "mixbits-summary",
        "version": 1,
        "mixbits": mixbits.__version__,
        "network": recipe.network,
        "dataset": run.dataset.name,
        "method": recipe.method,
        "budget": recipe.budget,
        "seed": recipe.seed,
        "epochs": {
            "learn": method_of(recipe).epochs,
            "finetune": recipe.finetune.epochs if recipe.train else 0,
            "uniform": recipe.finetune.epochs + method_of(recipe).epochs if recipe.train else 0,
        },
        "started": run.folder.read_json("started.json"),
        "machine": machine(),
        "float": run.result("float"),
        "uniform": uniform,
        "mixed": mixed,
        "limits": [
            {
                "limit": limit.cost,
                "unit": limit.unit,
                "text": limit.text,
                "asked": limit.asked,
                "used": mixed["costs"][limit.cost],
                "uniform_used": uniform["costs"][limit.cost] if uniform else None,
            }
            for limit in recipe.target().budget.limits
        ],
        "artifact_bytes": run.result("lower")["artifact_bytes"],
        "runtime": run.result("check"),
        "sites": _sites(run, program),
        "instructions": _instructions(run, program),
    }
    run.folder.write_json("summary.json", summary)
    return summary


def machine() -> str:
    """Processor, cores and versions, for provenance."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{processor()}, {torch.get_num_threads()} threads, {versions}"


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _sites(run: Run, program: Program) -> list[dict[str, Any]]:
    policy = run_policy(run)
    asked = run.result("learn")["asked"] if run.done("learn") else {}
    macs = {op.weight: op.macs for op in run.graph.profile.ops}
    stored = stored_widths(program)
    return [
        {
            "site": site.name,
            "kind": site.kind,
            "elements": site.elements,
            "asked_bits": asked.get(site.name),
            "assigned_bits": policy.bits[site.name],
            "stored_bits": stored.get(site.name),
            "grid": describe(policy.grids[site.name]),
            "macs": macs.get(site.name, 0),
            "runs_as": _runs_as(site.name, program),
        }
        for site in run.graph.profile.sites
    ]


def stored_widths(program: Program) -> dict[str, int]:
    """Width of every site in the packed model: of weights as stored, of activations as quantized."""
    widths = {name: weight.grid.bits for name, weight in program.weights.items()}
    widths.update({i.name: i.attrs["grid"]["bits"] for i in program.instructions if i.op == "quantize"})
    return widths


def _runs_as(site: str, program: Program) -> str:
    """How the packed model computes with a site."""
    readers = [i for i in program.instructions if i.attrs.get("weight") == site]
    if readers:
        return f"integer {readers[0].op} with {program.weights[site].grid.bits}-bit weights"
    if any(i.op == "quantize" and i.name == site for i in program.instructions):
        return "codes between instructions"
    return "not in the packed model"


def _instructions(run: Run, program: Program) -> list[dict[str, Any]]:
    """Every instruction with the arithmetic it runs in, and the widths of those that multiply."""
    macs = {op.name: op.macs for op in run.graph.profile.ops}
    known, rows = specs(program, 1), []
    for instruction in program.instructions:
        grids = [known[name].grid for name in instruction.inputs]
        weight = program.weights.get(instruction.attrs.get("weight", ""))
        row = {
            "op": instruction.op,
            "name": instruction.name,
            "arithmetic": "integer" if grids and all(grids) else "float",
            "weight_bits": None,
            "activation_bits": None,
            "macs": macs.get(instruction.name, 0),
            "accumulator_bits": None,
        }
        if weight is not None and grids[0] is not None:
            reduction = prod(weight.shape[1:])
            row["weight_bits"], row["activation_bits"] = weight.grid.bits, grids[0].bits
            row["accumulator_bits"] = accumulator_bound(reduction, weight.grid, grids[0]).bit_length() + 1
        rows.append(row)
    return rows
