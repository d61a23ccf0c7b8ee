"""Stages of a run: each reads what those before it left in the run folder, and is skipped if it is done."""

from __future__ import annotations

import dataclasses
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixbits.core.budget import LATENCY
from mixbits.core.cost import COSTS, Cost, find_cost, float_bits
from mixbits.core.grid import grid_from_json, grid_to_json
from mixbits.core.latency import LatencyTable
from mixbits.core.locate import locate
from mixbits.core.policy import Policy, policy_from_json
from mixbits.data.dataset import Dataset, with_normalization
from mixbits.data.open import open_dataset
from mixbits.fit.folder import RunFolder
from mixbits.fit.recipe import AnyRecipe, flat, method_of, recipe_from_dict, to_dict
from mixbits.fit.watching import kept
from mixbits.fit.weights import load_weights_, read_tensors, write_tensors
from mixbits.graph.quant_graph import QuantGraph, capture
from mixbits.lower.lower import lower
from mixbits.lower.untrained import lower_untrained
from mixbits.methods import method_named
from mixbits.pack.artifact import read_program, write_program
from mixbits.quant.quantizer import Frozen
from mixbits.runtime.executor import Executor
from mixbits.runtime.latency import here, predicted_ms
from mixbits.runtime.steps import speed
from mixbits.train.calibrate import calibrate, calibration_images, observe_float
from mixbits.train.checkpoint import Checkpoint, differences, fingerprint
from mixbits.train.finetune import OBSERVED_BATCHES, finetune, restore_policy
from mixbits.train.method import Method, learn
from mixbits.train.norms import reestimate_batch_norm_
from mixbits.train.processes import ALONE, Processes
from mixbits.train.steps import Loop, steps
from mixbits.train.task import Task, evaluate, task_of

Row = Mapping[str, Any]
NARROW = 2  # bits at which every accumulator suffices that suffices at any candidates
SEEN = 64  # samples of each part of the data that a checkpoint remembers
# What a run that was killed before it wrote its recipe may have left.
BEGUN = {
    *(".lock", "stages", "checkpoints", "metrics.jsonl", ".metrics.jsonl.tmp"),
    *("started.json", ".started.json.tmp", "made_of.json", ".made_of.json.tmp", ".recipe.json.tmp"),
}


class Run:
    """One run: its recipe, its folder, and the things that stages share, made when first needed.

    Several ``processes`` may train it. The folder is the main one's: only there is it read and written, and
    what the others need of it is sent to them.
    """

    def __init__(
        self,
        recipe: AnyRecipe,
        path: Path,
        watch: Callable[[Row], None],
        stop: threading.Event,
        processes: Processes = ALONE,
    ) -> None:
        """``watch`` gets every row of metrics and notes; ``stop`` asks the loop to save and leave."""
        self.recipe, self.folder, self.stop, self.processes = recipe, RunFolder(path), stop, processes
        self._tell = watch
        self._began: dict[str, float] = {}

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, normalized as the recipe says."""
        dataset = open_dataset(self.recipe.data)
        if self.recipe.mean or self.recipe.std:
            return with_normalization(
                dataset, self.recipe.mean or dataset.mean, self.recipe.std or dataset.std
            )
        return dataset

    @cached_property
    def task(self) -> Task:
        """Training, held-out and test batches."""
        recipe = self.recipe
        return task_of(
            self.dataset,
            batch_size=recipe.batch_size,
            held_out=recipe.held_out,
            seed=recipe.seed,
            train_images=recipe.train_images,
        )

    @cached_property
    def latency(self) -> LatencyTable | None:
        """The table of the budget's limit on latency, if it has one."""
        limit = self.recipe.target().budget.latency
        return None if limit is None else limit.table

    @cached_property
    def model(self) -> nn.Module:
        """The user's network with its trained weights."""
        torch.manual_seed(self.recipe.seed)
        return build_network(
            self.recipe.network, classes=len(self.dataset.classes), weights=self.recipe.weights
        )

    @cached_property
    def graph(self) -> QuantGraph:
        """The captured float network; trained ones once the float stage is done."""
        graph = capture(self.model, torch.zeros(2, *self.dataset.input_shape))
        if self.done("float"):
            graph.module.load_state_dict(self.tensors("float.safetensors"))
        graph.module.eval()
        return graph

    @cached_property
    def origin(self) -> QuantGraph:
        """The network that learning and the baseline start from: the float one, or one not trained at all.

        Batch norms of the latter have the statistics of its values, so that steps chosen from them are of use
        in training.
        """
        if self.recipe.start == "trained":
            return self.graph
        torch.manual_seed(self.recipe.seed)
        untrained = build_network(self.recipe.network, classes=len(self.dataset.classes))
        graph = capture(untrained, torch.zeros(2, *self.dataset.input_shape))
        reestimate_batch_norm_(graph, self.task.train, OBSERVED_BATCHES, torch.device("cpu"))
        return graph

    @property
    def device(self) -> torch.device:
        """Where training runs; each of several processes has its own."""
        return self.processes.device if self.processes.count > 1 else torch.device(self.recipe.device)

    def done(self, stage: str) -> bool:
        """Whether a stage has left its result."""
        return self.processes.once((self.folder / "stages" / f"{stage}.json").exists)

    def result(self, stage: str) -> dict[str, Any]:
        """The result of a stage; the error of a missing one names the command that makes it."""
        if not self.done(stage):
            raise ValueError(
                f"{self.folder.path}: the stage {stage!r} is not done yet; run it before this one"
            )
        return self.processes.once(lambda: self.folder.read_json(f"stages/{stage}.json"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file of the folder."""
        return self.processes.once(lambda: read_tensors(self.folder / name))

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors to the folder, whole or not at all."""
        self.processes.once(lambda: write_tensors(self.folder, name, tensors))

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON to the folder, whole or not at all."""
        self.processes.once(lambda: self.folder.write_json(name, value))

    @cached_property
    def contents(self) -> str:
        """What tells this data set from another of the same name: its sizes, targets and some samples."""
        parts = self.dataset.train, self.dataset.test
        samples = [part.take(np.linspace(0, len(part) - 1, SEEN).astype(int)) for part in parts]
        marks = [array for part, (x, y) in zip(parts, samples, strict=True) for array in (part.targets, x, y)]
        return f"{len(parts[0])} + {len(parts[1])} samples, {fingerprint(*marks)}"

    @property
    def made_of(self) -> dict[str, str]:
        """What a recipe names and does not hold: a run of many stages must find it unchanged."""
        return {"the network": fingerprint(str(self.graph.module)), "the data": self.contents}

    def loop(self, stage: str, policy: Policy | None = None) -> Loop:
        """How this run's loops train, with the stage's checkpoint; it goes on for the same run only.

        ``policy`` is the one that the stage trains at.
        """
        recipe = self.recipe
        path = self.folder / "checkpoints" / f"{stage}.pt"
        signature = {
            **flat(to_dict(recipe)),
            "the float network": fingerprint(*self.graph.module.state_dict().values()),
            "the data": self.contents,
            "the policy": fingerprint(json.dumps(policy.to_json())) if policy else None,
        }
        checkpoint = Checkpoint(path, signature, stop=self.stop)
        self._began[stage] = time.monotonic()
        torch.manual_seed(recipe.seed)
        return Loop(stage, self.device, recipe.compile, recipe.bf16, checkpoint, self.watch, self.processes)

    def watch(self, row: Row) -> None:
        """Keep a row of metrics and hand it on."""
        if "resumed_step" in row:
            self.folder.keep_rows(row["stage"], row["resumed_step"])
        elif kept(row):
            began = self._began.get(row["stage"], time.monotonic())
            self.folder.append_row({**row, "seconds": round(time.monotonic() - began, 2)})
        self._tell(row)

    def finish(self, stage: str, result: dict[str, Any]) -> None:
        """Keep a stage's result: from now on the stage is done."""
        self.write_json(f"stages/{stage}.json", result)


def build_network(spec: str, *, classes: int, weights: str = "") -> nn.Module:
    """The network of ``module:function`` with its weights; ``num_classes`` goes to functions that take it."""
    function = locate(spec)
    if not callable(function):
        raise ValueError(
            f"network {spec!r} is a {type(function).__name__}, not a function that returns an nn.Module"
        )
    takes_classes = "num_classes" in inspect.signature(function).parameters
    model = function(num_classes=classes) if takes_classes else function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"network {spec!r} returned {type(model).__name__}, not an nn.Module")
    if weights:
        load_weights_(model, Path(weights))
    return model.eval()


def check(run: Run, *, resume: bool) -> None:
    """Check everything that can be checked before work begins; nothing is written."""
    recipe = run.recipe
    for name in ("network", "data", "budget"):
        if not getattr(recipe, name):
            raise ValueError(f"--{name} is missing; see `mixbits fit --help`")
    if not recipe.weights and not recipe.float_training.epochs and recipe.network.startswith("mixbits.zoo"):
        raise ValueError(
            "the networks of mixbits.zoo are untrained: give --weights FILE, or --float-training.epochs N "
            "to train first"
        )
    if not recipe.train and recipe.start == "scratch":
        raise ValueError("--no-train needs a trained network: leave out --start scratch")
    if not recipe.train and method_of(recipe).epochs:
        raise ValueError(
            f"the method {recipe.method} trains for {method_of(recipe).epochs} epochs: with --no-train use "
            "--method sensitivity"
        )
    if recipe.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {recipe.device}: this torch sees no CUDA device; use --device cpu")
    target = recipe.target()
    _check_machine(run)
    target.choices(run.graph.profile)
    lower_untrained(run.graph, bits=NARROW)  # raises if there is an operation that cannot be packed
    len(run.task.train)  # raises if the training set cannot be split as asked
    if tuple(run.dataset.input_shape) != run.graph.profile.input_shape:
        raise ValueError("the network does not take the data set's input shape")
    run.processes.once(lambda: _check_folder(run, resume=resume))


def _check_folder(run: Run, *, resume: bool) -> None:
    path = run.folder.path
    if (path / "recipe.json").exists():
        if not resume:
            raise ValueError(f"{path} already holds a run; go on with --resume, or choose another --out")
        other = differences(flat(run.folder.read_json("recipe.json")), flat(to_dict(run.recipe)))
        if other:
            raise ValueError(
                f"{path} was started with other options: {other}; "
                "resume with the same ones, or choose another --out"
            )
        began = run.folder.read_json("made_of.json") if (path / "made_of.json").exists() else {}
        changed = [name for name, mark in run.made_of.items() if began.get(name, mark) != mark]
        if changed:
            raise ValueError(
                f"{path} was started with something else: {' and '.join(changed)} changed since; "
                "put back what it was, or choose another --out"
            )
    elif path.exists() and any(entry.name not in BEGUN for entry in path.iterdir()):
        raise ValueError(f"{path} exists and is not the folder of a mixbits run; choose another --out")


@contextmanager
def opened(run: Run, *, resume: bool) -> Iterator[None]:
    """Check, then hold the run's folder, made or reopened; no other process has it meanwhile."""
    check(run, resume=resume)

    def prepare() -> None:
        locked.enter_context(run.folder.locked())
        _check_folder(run, resume=resume)  # again: another process may have come first
        for name in ("stages", "checkpoints"):
            (run.folder / name).mkdir(exist_ok=True)
        if not (run.folder / "recipe.json").exists():
            run.folder.write_bytes("metrics.jsonl", b"")  # a run that does not train has no row
            run.folder.write_json("started.json", time.strftime("%Y-%m-%dT%H:%M:%S"))
            run.folder.write_json("made_of.json", run.made_of)
            run.folder.write_json("recipe.json", to_dict(run.recipe))

    with ExitStack() as locked:
        run.processes.once(prepare)
        yield


def _check_machine(run: Run) -> None:
    """Raise ``ValueError`` if the latency table is of another machine, unless the recipe says so."""
    if run.latency is not None and not run.recipe.latency_elsewhere:
        run.latency.check_machine(*here())


def _costs(run: Run) -> dict[str, Cost]:
    """All costs, and those of the budget that state an array of their own; not latency."""
    limited = {limit.cost: find_cost(limit.cost) for limit in run.recipe.target().budget.limits}
    return COSTS | {name: cost for name, cost in limited.items() if cost is not None}


def measured(run: Run, network: QuantGraph, bits: Mapping[str, int], seconds: float) -> dict[str, Any]:
    """Accuracy on the test set and all costs of a network at these widths."""
    test = evaluate(network.module.eval(), run.task, run.task.test, run.device, run.processes)
    held_out = evaluate(network.module, run.task, run.task.held_out, run.device, run.processes)
    costs = {name: cost.of(run.graph.profile, bits) for name, cost in _costs(run).items() if cost.holds(bits)}
    if run.latency is not None and bits != float_bits(run.graph.profile):  # the table holds no floats
        costs[LATENCY] = predicted_ms(run.latency, run.graph.profile, bits)
    return {
        "top1": test["top1"],
        "held_out_top1": held_out["top1"],
        "weight_bytes": costs["weights"],
        "size_bytes": costs["size"],
        "avg_weight_bits": costs["weight_bits"],
        "avg_act_bits": costs["act_bits"],
        "bops": costs["bops"],
        "act_max_bytes": costs["act_max"],
        "act_sum_bytes": costs["act_sum"],
        "act_peak_bytes": costs["act_peak"],
        "costs": costs,
        "widths": dict(bits),
        "seconds": round(seconds, 1),
    }


def float_stage(run: Run) -> None:
    """Train the float network if the recipe says so, and measure it."""
    if run.done("float"):
        return
    began, options = time.monotonic(), run.recipe.float_training
    if options.epochs:
        optimizer = torch.optim.SGD(
            run.graph.module.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
        )
        loop = run.loop("float")
        for _ in steps(
            run.graph, run.task, optimizer, loop, epochs=options.epochs, schedule=options.schedule
        ):
            pass
    seconds = time.monotonic() - began
    run.graph.module.to(run.device)
    result = measured(run, run.graph, float_bits(run.graph.profile), seconds)
    run.graph.module.cpu()
    run.write_tensors("float.safetensors", run.graph.module.state_dict())
    run.finish("float", result)


def uniform_stage(run: Run) -> None:
    """The baseline: uniform widths under the same budget, from the same start, for as many epochs."""
    if run.done("uniform") or not run.recipe.baseline:
        return
    began, recipe = time.monotonic(), run.recipe
    policy, learned = learn(
        method_named("uniform")(), run.origin, run.task, recipe.target(), run.loop("uniform")
    )
    epochs = recipe.finetune.epochs + method_of(recipe).epochs
    network = _finetuned(
        run, "uniform", learned.graph, policy, method=method_named("uniform")(), epochs=epochs
    )
    result = measured(run, network, policy.bits, time.monotonic() - began)
    run.write_json("policy_uniform.json", policy.to_json())
    run.write_tensors("uniform.safetensors", network.module.state_dict())
    run.finish("uniform", result)


def learn_stage(run: Run) -> None:
    """Learn the widths: policy.json, and the network as it was learned."""
    if run.done("learn"):
        return
    began = time.monotonic()
    policy, learned = learn(
        method_of(run.recipe), run.origin, run.task, run.recipe.target(), run.loop("learn")
    )
    network = {k: v for k, v in learned.graph.module.state_dict().items() if not k.startswith("quantizers.")}
    run.write_tensors("learned.safetensors", network)
    run.write_json("policy.json", policy.to_json())
    steps_learned = {
        site: {"grid": grid_to_json(frozen.grid), "step": frozen.step.flatten().tolist()}
        for site, frozen in learned.frozen.items()
    }
    asked = {site: float(bits) for site, bits in learned.bits.items()}
    run.finish(
        "learn", {"asked": asked, "frozen": steps_learned, "seconds": round(time.monotonic() - began, 1)}
    )


def finetune_stage(run: Run) -> None:
    """Train at the widths of policy.json, from what was learned if the policy was learned here."""
    if run.done("finetune"):
        return
    began, policy = time.monotonic(), run_policy(run)
    result: dict[str, Any] = run.result("learn") if run.done("learn") else {"seconds": 0.0}
    graph, start_steps = run.origin, None
    if run.done("learn") and method_of(run.recipe).epochs:
        graph = run.graph.copy()
        graph.module.load_state_dict(run.tensors("learned.safetensors"))
        start_steps = {
            site: Frozen(grid_from_json(entry["grid"]), torch.tensor(entry["step"]).squeeze())
            for site, entry in result["frozen"].items()
        }
    network = _finetuned(
        run, "finetune", graph, policy, method=method_of(run.recipe), start_steps=start_steps
    )
    run.write_tensors("finetuned.safetensors", network.module.state_dict())
    run.finish("finetune", measured(run, network, policy.bits, result["seconds"] + time.monotonic() - began))


def _finetuned(
    run: Run,
    stage: str,
    graph: QuantGraph,
    policy: Policy,
    *,
    method: Method,
    epochs: int | None = None,
    start_steps: Mapping[str, Frozen] | None = None,
) -> QuantGraph:
    placed = None
    if start_steps is None and run.recipe.start == "trained":  # nothing was learned to start from
        images = calibration_images(run.task.train, run.recipe.images, run.device)
        placed = calibrate(graph, policy, images, observe_float(graph, images))
        if not run.recipe.train:
            return placed
    options = method.finetuning(run.recipe.finetune)
    if epochs is not None:
        options = dataclasses.replace(options, epochs=epochs)
    return finetune(
        graph,
        policy,
        run.task,
        options,
        run.loop(stage, policy),
        start=start_steps,
        teacher=run.graph if options.distill else None,
        placed=placed,
        quantizer=method.quantizer,
        extra_loss=method.extra_loss,
    )


def run_policy(run: Run) -> Policy:
    """The policy in the run folder, checked against the network."""
    policy = policy_from_json(run.processes.once(lambda: run.folder.read_json("policy.json")))
    policy.check(run.graph.profile)
    return policy


def trained_network(run: Run) -> QuantGraph:
    """The network as the finetune stage left it, with the quantizers of policy.json, in eval mode."""
    run.result("finetune")
    return restore_policy(run.graph, run_policy(run), run.tensors("finetuned.safetensors"))


def network_of(path: Path) -> QuantGraph:
    """The trained network of the run in a folder."""
    folder = RunFolder(path)
    recipe = recipe_from_dict(folder.read_json("recipe.json"), str(folder / "recipe.json"))
    return trained_network(Run(recipe, path, lambda row: None, threading.Event()))


def lower_stage(run: Run) -> None:
    """Pack the finetuned network into model.mixbits."""
    if run.done("lower"):
        return
    network = trained_network(run)
    about = {
        "network": run.recipe.network,
        "method": run.recipe.method,
        "dataset": run.dataset.name,
        "classes": list(run.dataset.classes),
        "mean": list(run.dataset.mean),
        "std": list(run.dataset.std),
    }
    program = lower(network, about=about)
    write_program(program, run.folder / "model.mixbits")
    run.finish("lower", {"artifact_bytes": (run.folder / "model.mixbits").stat().st_size})


def check_stage(run: Run) -> None:
    """Run the packed model without torch on test images and compare it with the training graph."""
    if run.done("check"):
        return
    began = time.monotonic()
    table = None if run.recipe.latency_elsewhere else run.latency
    threads, tune = (table.threads, table.tuned) if table else (1, False)
    executor = Executor(read_program(run.folder / "model.mixbits"), threads=threads, tune=tune)
    network = trained_network(run)
    correct = as_trained = same = count = 0
    for inputs, targets in run.task.test.epoch(0):
        ran = torch.from_numpy(executor(inputs.numpy())).argmax(-1)
        with torch.no_grad():
            trained = network(inputs).argmax(-1)
        correct += int((ran == targets).sum())
        as_trained += int((trained == targets).sum())
        same += int((ran == trained).sum())
        count += len(targets)
        if count >= run.recipe.check_images:
            break
    seconds = round(time.monotonic() - began, 1)
    batch = table.batch if table else 1
    images = next(iter(run.task.test.epoch(0)))[0].numpy()
    run.finish(
        "check",
        {
            **speed(executor, np.resize(images, (batch, *images.shape[1:]))),
            "predicted_ms": predicted_ms(table, run.graph.profile, run_policy(run).bits) if table else None,
            "top1": 100 * correct / count,
            "training_graph_top1": 100 * as_trained / count,
            "images": count,
            "same_prediction_as_training_graph": same,
            "seconds": seconds,
        },
    )


TRAINING = ("float", "uniform", "learn", "finetune")  # stages that several processes share
STAGES: dict[str, Callable[[Run], None]] = {
    "float": float_stage,
    "uniform": uniform_stage,
    "learn": learn_stage,
    "finetune": finetune_stage,
    "lower": lower_stage,
    "check": check_stage,
}
