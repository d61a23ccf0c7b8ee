"""A training that may be killed at any moment, in a process of its own: it goes on from what it finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mixbits.core.budget import parse_budget
from mixbits.core.files import whole_file
from mixbits.data.digits import load_digits
from mixbits.graph.quant_graph import capture
from mixbits.methods import method_named
from mixbits.train.checkpoint import Checkpoint
from mixbits.train.finetune import Finetune, finetune
from mixbits.train.method import Target, learn
from mixbits.train.steps import Loop
from mixbits.train.task import task_of
from mixbits.zoo import digits_cnn

RESULT = "result.pt"
STARTED = "started"  # appears when training begins or goes on

# Made when this is imported, which is before processes are forked.
GRAPH = capture(digits_cnn(), torch.zeros(2, 1, 8, 8))
TASK = task_of(load_digits(), batch_size=32, held_out=0.05, train_images=256)
TARGET = Target(parse_budget("weights=3bit,act=4bit"))


def train(method: str, options: dict[str, object], folder: Path) -> None:
    """Learn widths on a part of the digits, train at them, write what came out; saved after every step."""
    torch.set_num_threads(1)

    def loop(stage: str) -> Loop:
        torch.default_generator.manual_seed(1)
        checkpoint = Checkpoint(folder / f"{stage}.pt", {"method": method}, every_seconds=0)
        return Loop(stage, checkpoint=checkpoint, watch=lambda row: (folder / STARTED).touch())

    chosen = replace(method_named(method)(), epochs=2, **options)
    policy, learned = learn(chosen, GRAPH, TASK, TARGET, loop("learn"))
    network = finetune(
        learned.graph, policy, TASK, Finetune(epochs=1), loop("finetune"), start=learned.frozen
    )
    with whole_file(folder / RESULT) as file:
        torch.save({"policy": policy.to_json(), "network": network.module.state_dict()}, file)
