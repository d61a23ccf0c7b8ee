"""Matrices of runs: budgets, epochs, cells, statistics over seeds, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixbits.core.budget import budget_points
from mixbits.data.dataset import ArraySamples, Dataset
from mixbits.fit.matrix import compared_methods, epoch_split, float_recipe, matrix_of, matrix_recipe
from mixbits.fit.recipe import own_entries, recipe_from_dict, to_dict
from mixbits.fit.table import comparison_table
from mixbits.methods import find_methods
from mixbits.report.comparison import build_comparison, rows
from mixbits.report.matrix import Cell, Compared, Comparison, Float, front, paired, read_comparison
from mixbits.report.read import Limit, Network
from mixbits.report.versus import comparison_verdict
from mixbits.train.task import task_of

BUDGET = "weights=3bit"


# --- budgets -------------------------------------------------------------------------------------------------


def test_a_range_has_both_ends_and_even_steps():
    assert budget_points("weights=2bit..4bit:5") == tuple(
        f"weights={bits}bit" for bits in ("2", "2.5", "3", "3.5", "4")
    )


def test_ranges_of_one_budget_run_together():
    assert budget_points("weights=60KiB..70KiB:2,bops=0.4..0.5G:2,act=4bit") == (
        "weights=60KiB,bops=0.4G,act=4bit",
        "weights=70KiB,bops=0.5G,act=4bit",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    {
        "no points": ("weights=2bit..4bit", "cannot read the range"),
        "one point": ("weights=2bit..4bit:1", "two points or more"),
        "two units": ("weights=2KiB..4bit:3", "two units"),
        "different counts": ("weights=2..4bit:3,act=2..4bit:5", "different numbers of points"),
        "twice": ("weights=3bit;weights=3bit", "asked for twice"),
        "twice, in other words": ("weights=3bit,act=4bit;act=4.0 bit, weights=3bit", "act=4.0bit,.* twice"),
        "nothing": (" ; ", "there is no budget"),
        "unknown limit": ("wieghts=2..4bit:3", "unknown limit 'wieghts'"),
    }.values(),
)
def test_a_bad_range_says_what_is_wrong(text: str, words: str):
    with pytest.raises(ValueError, match=words):
        budget_points(text)


# --- plan ----------------------------------------------------------------------------------------------------


def recipe(command: str = "compare", methods: tuple[str, ...] | None = None, **changes: object):
    options = {"budgets": BUDGET, "seeds": 2} | dict(changes.pop("options", {}))  # type: ignore[call-overload]
    entries = {"network": "n", "data": "digits", "method": "mpdnn", "mpdnn": {"epochs": 3}, command: options}
    names = tuple(find_methods()) if methods is None else methods
    return matrix_recipe(command, entries | {"finetune": {"epochs": 7}} | changes, names, "test")  # type: ignore[arg-type]


def test_every_method_trains_for_the_same_epochs_in_total():
    matrix = matrix_of("compare", recipe(options={"learn_epochs": 2}))
    totals = {
        (cell.method, getattr(cell.recipe, cell.method).epochs + cell.recipe.finetune.epochs)
        for cell in matrix.cells
    }
    assert matrix.epochs == 10
    assert totals == {(name, 10) for name in find_methods()}


def test_a_method_that_does_not_train_to_learn_keeps_all_epochs_for_the_rest():
    assert epoch_split(0, 10, common=4) == (0, 10)


def test_more_epochs_to_learn_than_there_are_is_an_error_that_names_the_method():
    with pytest.raises(ValueError, match="mpdnn: 3 of 2 epochs are to learn widths"):
        matrix_of("compare", recipe(options={"epochs": 2, "methods": "mpdnn"}))


def test_baselines_come_first_and_are_always_included():
    names = compared_methods("mpdnn")
    baselines = [name for name, method in find_methods().items() if method.baseline]
    assert names[0] == "uniform"
    assert sorted(names) == sorted([*baselines, "mpdnn"])
    assert set(compared_methods("")) == set(find_methods())


def test_a_sweep_has_its_one_method_and_no_baseline():
    matrix = matrix_of("sweep", recipe("sweep", ("mpdnn",), options={"budgets": "weights=2..4bit:3"}))
    assert {cell.method for cell in matrix.cells} == {"mpdnn"}
    assert len(matrix.cells) == 3 * 2


def test_cells_of_a_seed_differ_in_method_and_budget_only_and_their_float_network_in_neither():
    asked = recipe(options={"budgets": "weights=3bit;weights=4bit", "seeds": 1})
    matrix = matrix_of("compare", asked)
    first = matrix.cells[0].recipe
    for cell in matrix.cells:
        for name in ("network", "data", "seed", "batch_size", "held_out", "float_training", "train_images"):
            assert getattr(cell.recipe, name) == getattr(first, name)
        assert not cell.recipe.baseline
    other = recipe(options={"budgets": "weights=5bit", "seeds": 1})
    assert to_dict(float_recipe(asked, 0)) == to_dict(float_recipe(other, 0))
    assert to_dict(float_recipe(asked, 0)) != to_dict(float_recipe(asked, 1))


def test_one_recipe_file_may_hold_the_options_of_many_methods_and_commands():
    entries = {"method": "mpdnn", "mpdnn": {"epochs": 1}, "uniform": {"epochs": 0}, "compare": {"seeds": 2}}
    own = own_entries(entries, ["mpdnn"])
    assert own == {"method": "mpdnn", "mpdnn": {"epochs": 1}}
    assert recipe_from_dict(own, "test").mpdnn.epochs == 1


def test_train_images_leaves_held_out_and_test_data_alone_and_keeps_the_classes_in_proportion():
    x = np.arange(100, dtype=np.float32)[:, None, None, None]
    samples = ArraySamples(x, np.arange(100) % 4, mean=(0.0,), std=(1.0,))
    dataset = Dataset("d", samples, samples, ("a", "b", "c", "d"), (1, 1, 1), (0.0,), (1.0,))
    whole, part = task_of(dataset, batch_size=8), task_of(dataset, batch_size=8, train_images=40)
    again = task_of(dataset, batch_size=8, train_images=40)

    def values(batches):  # type: ignore[no-untyped-def]
        return sorted(value for inputs, _ in batches.epoch(0) for value in inputs.flatten().tolist())

    assert values(part.held_out) == values(whole.held_out)
    assert values(part.train) == values(again.train)
    assert set(values(part.train)) < set(values(whole.train)) | set(range(100))
    assert not set(values(part.train)) & set(values(part.held_out))
    classes = np.concatenate([targets.numpy() for _, targets in part.train.epoch(0)])
    assert np.bincount(classes).tolist() == [10, 10, 10, 10]
    with pytest.raises(ValueError, match="91 training images are asked for; expected 1 .. 90"):
        task_of(dataset, train_images=91)


# --- statistics ----------------------------------------------------------------------------------------------


def test_the_front_holds_what_no_other_point_beats():
    points = [(3.0, 89.0), (1.0, 88.0), (2.0, 90.0), (2.0, 90.0), (1.0, 87.0)]
    assert front(points) == [1, 2, 3]


def cells(method: str, scores: list[float], *, used: float = 3.0, budget: str = BUDGET) -> list[Cell]:
    limit = Limit("weight_bits", "bit", budget, asked=3.0, used=used)
    return [
        Cell(method, budget, seed, "done", network=Network(top1=score, weight_bytes=7000), limits=(limit,))
        for seed, score in enumerate(scores)
    ]


def compared(**scores: list[float]) -> Comparison:
    made = [cell for method, values in scores.items() for cell in cells(method, values)]
    return Comparison(
        command="compare",
        epochs=10,
        methods=tuple(
            Compared(name, baseline=name in ("uniform", "random"), learn_epochs=3, finetune_epochs=7)
            for name in scores
        ),
        budgets=(BUDGET,),
        seeds=tuple(range(len(scores["uniform"]))),
        floats=(Float(0, Network(top1=92.0)),),
        cells=tuple(made),
    )


def test_the_interval_is_student_t_over_the_paired_differences():
    run = compared(uniform=[90.0, 91.0, 92.0], mpdnn=[90.5, 91.6, 92.7])
    pair = paired(run.group("mpdnn", BUDGET), run.group("uniform", BUDGET))
    assert pair is not None
    assert pair.n == 3
    assert pair.mean == pytest.approx(0.6)
    assert pair.half == pytest.approx(
        4.302653 * 0.1 / 3**0.5, rel=1e-6
    )  # t(2, 0.975), standard deviation 0.1
    assert pair.established


def test_seeds_that_one_of_two_methods_lacks_are_left_out():
    run = compared(uniform=[90.0, 91.0, 92.0], mpdnn=[90.5, 91.5])
    pair = paired(run.group("mpdnn", BUDGET), run.group("uniform", BUDGET))
    assert pair is not None
    assert (pair.n, pair.mean) == (2, pytest.approx(0.5))
    assert not pair.established  # two equal differences have no spread, and still are only two


# --- verdict -------------------------------------------------------------------------------------------------


def sentences(run: Comparison) -> list[tuple[str, str]]:
    headings, _ = comparison_verdict(run)
    return [(sentence.tone, sentence.text) for heading in headings for sentence in heading.sentences]


def test_an_established_gain_is_said_with_its_interval():
    said = sentences(compared(uniform=[90.0, 91.0, 92.0], mpdnn=[90.5, 91.6, 92.7]))
    assert said == [
        ("good", "Mixed precision paid here: mpdnn is established above uniform widths."),
        (
            "good",
            "mpdnn paid. Against uniform +0.60* (3 seeds paired, 95 % interval +0.35 to +0.85).",
        ),
    ]


def test_a_gain_within_the_noise_is_not_established():
    said = sentences(compared(uniform=[90.0, 91.0, 92.0], mpdnn=[91.5, 90.6, 92.7]))
    assert said[0] == ("plain", "Whether mixed precision pays here is not established with 3 seeds.")
    assert said[1][0] == "plain"
    assert said[1][1].startswith("mpdnn is above uniform, which is not established. Against uniform +0.60 (")


def test_one_seed_establishes_nothing():
    said = sentences(compared(uniform=[80.0], mpdnn=[90.0]))
    assert said[0] == ("plain", "Whether mixed precision pays here is not established with one seed.")
    assert "one seed, no interval" in said[1][1]


def test_a_loss_is_called_one():
    said = sentences(compared(uniform=[90.0, 91.0, 92.0], mpdnn=[89.0, 90.1, 90.9]))
    wanted = "Mixed precision did not pay here: no learned widths are above uniform ones "
    assert said[0] == ("bad", f"{wanted}(established below for mpdnn).")
    assert said[1][0] == "bad"
    assert said[1][1].startswith("mpdnn did not pay. Against uniform −1.00* (3 seeds paired")


def test_a_loss_within_the_noise_is_not_established():
    said = sentences(compared(uniform=[90.0, 91.0, 92.0], mpdnn=[89.0, 91.2, 92.1]))
    assert said[0][1].endswith(
        "no learned widths are above uniform ones (established below for none with 3 seeds)."
    )
    assert said[1][1].startswith("mpdnn is below uniform, which is not established.")


def test_a_gain_that_is_established_alone_is_not_so_among_many_methods():
    gain = [90.6, 91.5, 92.9]  # p = 0.014
    alone = sentences(compared(uniform=[90.0, 91.0, 92.0], mpdnn=gain))
    among = sentences(
        compared(
            uniform=[90.0, 91.0, 92.0],
            mpdnn=gain,
            **{f"other{i}": [90.1 - 0.1 * i, 91.2, 91.7 + 0.1 * i] for i in range(4)},
        )
    )
    assert alone[0][1].startswith("Mixed precision paid here: mpdnn is established above uniform widths")
    assert among[0] == (
        "plain",
        (
            "Whether mixed precision pays here is not established: mpdnn would be above uniform widths if nothing "
            "else had been tried, but 5 methods were."
        ),
    )


def test_a_gain_over_uniform_that_is_not_one_over_random_widths_does_not_pay():
    run = compared(uniform=[90.0, 91.0, 92.0], random=[90.4, 91.7, 92.6], mpdnn=[90.5, 91.6, 92.7])
    wanted = "mpdnn is established above uniform widths, but not above random ones."
    assert sentences(run)[0] == ("plain", wanted)


def test_widths_not_learned_that_are_above_uniform_are_named():
    said = sentences(
        compared(uniform=[90.0, 91.0, 92.0], random=[91.0, 92.0, 93.1], mpdnn=[89.5, 90.6, 91.4])
    )
    assert said[0][1].startswith("Mixed precision did not pay here: no learned widths are above uniform ones")
    assert said[-1][1].startswith("random is established above uniform widths, without learning any: +1.03*")


def with_widths(run: Comparison, method: str, bits: int) -> Comparison:
    made = tuple(
        replace(cell, network=replace(cell.network, widths={"conv.weight": bits}))
        if cell.method == method
        else cell
        for cell in run.cells
    )
    return replace(run, cells=made)


def test_runs_with_the_widths_of_uniform_say_nothing_of_mixed_precision():
    run = compared(uniform=[90.0, 91.0, 92.0], mpdnn=[89.0, 90.1, 90.9])
    run = with_widths(with_widths(run, "uniform", 2), "mpdnn", 2)
    said = sentences(run)
    wanted = "Every run has uniform's widths here: this says nothing of mixed precision."
    assert said[0] == ("plain", wanted)
    assert said[1][1].endswith("In 3 of 3 runs its widths are uniform's: no difference of widths.")
    said = sentences(with_widths(run, "mpdnn", 3))
    assert said[0][1].startswith("Mixed precision did not pay here")
    assert not said[1][1].endswith("no difference of widths.")


def test_unequal_costs_without_a_limit_and_other_finetuning_are_said():
    run = compared(uniform=[90.0, 91.0], mpdnn=[90.5, 91.6])
    cells = [
        replace(cell, network=replace(cell.network, bops=1.3e7 if cell.method == "mpdnn" else 1e7))
        for cell in run.cells
    ]
    run = replace(
        run, cells=tuple(cells), methods=(run.methods[0], replace(run.methods[1], finetuning="distill 1"))
    )
    wanted = "Not limited and not equal, bit operations: mpdnn 30.0 % more than uniform."
    assert ("plain", wanted) in sentences(run)
    _, general = comparison_verdict(run)
    assert general[0].text.startswith("Finetuned otherwise than the recipe says: mpdnn (distill 1).")


def test_a_method_below_random_widths_is_said_to_be():
    run = compared(uniform=[90.0, 91.0, 92.0], random=[91.0, 92.0, 93.1], mpdnn=[90.5, 91.6, 92.7])
    said = sentences(run)
    wanted = "mpdnn is established above uniform widths, but below widths not learned at all: "
    assert said[0] == ("bad", f"{wanted}learning did not pay here.")
    assert said[1][0] == "bad"
    assert said[1][1].endswith(", random −0.43*.")


def test_spending_more_of_a_limit_than_uniform_is_said():
    run = compared(uniform=[90.0, 91.0], mpdnn=[90.5, 91.6])
    less = [replace(cell, limits=cells("uniform", [0.0], used=2.7)[0].limits) for cell in run.cells[:2]]
    said = sentences(replace(run, cells=(*less, *run.cells[2:])))
    wanted = (
        "Not an equal spend of average weight width: uniform uses 90.0 % of the limit, mpdnn more (100.0 %)."
    )
    assert ("plain", wanted) in said


def test_a_limit_that_is_exceeded_is_said():
    run = compared(uniform=[90.0, 91.0], mpdnn=[90.5, 91.6])
    over = [replace(cell, limits=cells("mpdnn", [0.0], used=3.1)[0].limits) for cell in run.cells[2:]]
    said = sentences(replace(run, cells=(*run.cells[:2], *over)))
    both = "mpdnn on average weight width (seed 0), mpdnn on average weight width (seed 1)"
    assert ("bad", f"Limits are exceeded: {both}.") in said


def test_a_gain_outside_the_budget_does_not_pay():
    run = compared(uniform=[90.0, 91.0, 92.0], mpdnn=[90.5, 91.6, 92.7])
    over = [replace(cell, limits=cells("mpdnn", [0.0], used=3.1)[0].limits) for cell in run.cells[3:]]
    tone, text = sentences(replace(run, cells=(*run.cells[:3], *over)))[0]
    assert tone == "plain"
    assert text.startswith("Whether mixed precision pays here is not established")


def test_failed_runs_and_unequal_epochs_are_said():
    run = compared(uniform=[90.0, 91.0], mpdnn=[90.5, 91.6])
    failed = Cell("mpdnn", BUDGET, 1, "failed", folder="mpdnn/b/seed1", error="diverged")
    longer = replace(run.methods[1], finetune_epochs=9)
    run = replace(run, cells=(*run.cells[:3], failed), methods=(run.methods[0], longer))
    _, general = comparison_verdict(run)
    assert [sentence.text for sentence in general[:2]] == [
        "1 of 4 runs failed: mpdnn/b/seed1.",
        "Not trained for 10 epochs like the others: mpdnn (12).",
    ]
    assert rows(run, BUDGET)[1].runs == "1 of 2"


def test_a_sweep_says_which_points_are_beaten():
    made = [
        *cells("mpdnn", [90.0], budget="weights=2bit"),
        *(replace(cell, network=Network(top1=89.0, weight_bytes=9000)) for cell in cells("mpdnn", [0.0])),
    ]
    run = Comparison(
        "sweep",
        methods=(Compared("mpdnn", baseline=False),),
        budgets=("weights=2bit", BUDGET),
        seeds=(0,),
        cells=tuple(made),
    )
    headings, _ = comparison_verdict(run)
    assert [[sentence.tone for sentence in heading.sentences] for heading in headings] == [
        ["plain"],
        ["plain", "bad"],
    ]


# --- table, file, page ---------------------------------------------------------------------------------------


def test_the_table_has_mean_spread_count_and_difference():
    table = comparison_table(compared(uniform=[90.0, 91.0, 92.0], mpdnn=[90.5, 91.6, 92.7]))
    row = next(line.split() for line in table.splitlines() if line.split()[:1] == ["mpdnn"] and "±" in line)
    assert row[1:6] == ["91.60", "±", "1.10", "3", "+0.60"]


def test_a_file_of_another_format_is_refused(tmp_path: Path):
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"format": "mixbits-summary", "version": 1}))
    with pytest.raises(ValueError, match="the format must be 'mixbits-comparison'"):
        read_comparison(path)


def test_a_page_is_made_when_nothing_has_a_result(tmp_path: Path):
    path = tmp_path / "comparison.json"
    entry = {
        "format": "mixbits-comparison",
        "version": 1,
        "methods": [{"method": "uniform", "baseline": True}],
        "budgets": [BUDGET],
        "seeds": [0],
        "cells": [
            {
                "method": "uniform",
                "budget": BUDGET,
                "seed": 0,
                "status": "failed",
                "error": "<script>x</script>",
            }
        ],
    }
    path.write_text(json.dumps(entry))
    page = build_comparison(path).read_text()
    assert "No run has a result." in page
    assert "&lt;script&gt;x" in page
    assert "<script" not in page
    assert build_comparison(path).read_text() == page
