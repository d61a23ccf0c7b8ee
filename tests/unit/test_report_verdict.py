"""The sentences of the verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixbits.report.read import Instruction, Limit, Network, Runtime, Site, Summary
from mixbits.report.verdict import verdict

WEIGHTS = Limit("weights", "bytes", "weights=70KiB", asked=71680.0, used=71000.0, uniform_used=67000.0)
BOPS = Limit("bops", "bop", "bops=0.5G", asked=5e8, used=4.9e8, uniform_used=4.0e8)
SITE = Site("conv1.weight", "weight", elements=432, asked_bits=4.3, assigned_bits=4, stored_bits=4)
RUN = Summary(
    seed=7,
    artifact_bytes=78000,
    float_=Network(top1=91.73, weight_bytes=1073344, bops=4.15e10),
    uniform=Network(top1=89.5),
    mixed=Network(top1=90.75, weight_bytes=71000, bops=4.9e8),
    limits=(WEIGHTS, BOPS),
    sites=(SITE, replace(SITE, site="conv2.weight")),
    runtime=Runtime(
        top1=90.7, training_graph_top1=90.72, images=10000, same_prediction_as_training_graph=9998
    ),
    instructions=(
        Instruction("conv2d", "conv1", "integer", 4, 8, 999_000_000),
        Instruction("linear", "fc", "float", None, None, 1_000_000),
    ),
)


def sentences(run: Summary, tone: str) -> list[str]:
    return [sentence.text for sentence in verdict(run) if sentence.tone == tone]


def test_a_good_run_is_told_in_its_numbers() -> None:
    assert sentences(RUN, "bad") == []
    assert sentences(RUN, "good") == [
        "Every limit is met: weights 69.3 KiB of 70.0 KiB, bit operations 0.490 GBOP of 0.500 GBOP.",
        (
            "Mixed precision gains 1.25 points over uniform widths at the same budget: "
            "90.75 % top-1 against 89.50 %."
        ),
        "All 2 sites are stored at the assigned width.",
    ]
    assert sentences(RUN, "plain") == [
        (
            "The mixed network loses 0.98 points against the float network (90.75 % against 91.73 %), "
            "with weights 15.1 times smaller and bit operations 84.7 times fewer."
        ),
        (
            "The packed file (76.2 KiB), run on its own, scores 90.70 % top-1 on 10,000 test images, where the "
            "training graph has 90.72 %, and predicts the same class as the training graph for 9,998 of 10,000."
        ),
        "Of 1.0 billion MACs, 99.9 % run as integer arithmetic.",
        (
            "This is one run with one seed (7). Top-1 moves from seed to seed: "
            "repeat the run with other seeds before trusting a small difference."
        ),
    ]


@pytest.mark.parametrize(
    ("mixed", "size"), [(89.5, "no difference"), (89.0, "0.50 points less"), (89.498, "0.002 points less")]
)
def test_mixed_precision_that_is_not_better_did_not_pay(mixed: float, size: str) -> None:
    run = replace(RUN, mixed=Network(top1=mixed))

    (text,) = sentences(run, "bad")

    top1 = f"{mixed:.2f} % top-1 against 89.50 % for uniform widths"
    assert text == f"Mixed precision did not pay here: {top1}, {size}."


def test_a_limit_that_is_not_met_is_named_with_what_is_too_much() -> None:
    run = replace(RUN, limits=(replace(WEIGHTS, used=71681.0), BOPS))

    broken, compared = sentences(run, "bad")

    assert (
        broken == "The limit on weights is not met: 70.0 KiB of 70.0 KiB used (100.001 %), 1 byte too much."
    )
    assert "outside the budget: this is not a comparison at the same budget" in compared
    assert not any("Every limit" in text for text in sentences(run, "good"))


def test_a_uniform_network_outside_the_budget_is_not_called_the_same_budget() -> None:
    run = replace(RUN, limits=(replace(WEIGHTS, uniform_used=80000.0), BOPS))

    gain = sentences(run, "good")[1]

    assert gain.endswith("although the uniform network exceeds the limit on weights.")
    assert "same budget" not in gain


def test_losing_to_a_uniform_network_outside_the_budget_is_excused() -> None:
    run = replace(RUN, mixed=Network(top1=89.0), limits=(replace(WEIGHTS, uniform_used=80000.0), BOPS))

    assert sentences(run, "bad") == []
    assert any(text.endswith("less; but the uniform network exceeds the limit on weights.")
               for text in sentences(run, "plain"))  # fmt: skip


def test_a_limit_used_to_the_last_bit_is_met() -> None:
    third = 0.1 + 0.2  # a little more than 0.3 in floating point
    run = replace(RUN, limits=(Limit("act_bits", "bit", asked=0.3, used=third, uniform_used=0.3),))

    assert sentences(run, "good")[0].startswith("Every limit is met")


def test_a_limit_of_unknown_use_is_not_called_met() -> None:
    run = replace(RUN, limits=(replace(WEIGHTS, used=None), BOPS))

    assert sentences(run, "bad") == ["Whether the limit on weights is met is not known."]


def test_a_run_without_limits_says_so() -> None:
    assert "No limit was set." in sentences(replace(RUN, limits=()), "plain")


def test_uniform_widths_that_were_not_run_are_not_compared() -> None:
    run = replace(RUN, uniform=None)

    assert "Uniform widths were not run: nothing to compare mixed precision with." in sentences(run, "plain")


def test_sites_stored_at_another_width_are_counted_and_named() -> None:
    run = replace(RUN, sites=(SITE, replace(SITE, site="conv2.weight", stored_bits=8)))

    assert sentences(run, "bad") == [
        "1 of 2 sites is stored at another width than assigned: conv2.weight (assigned 4, stored 8)."
    ]


def test_many_differing_sites_are_named_in_part() -> None:
    run = replace(RUN, sites=tuple(replace(SITE, site=f"s{i}", stored_bits=8) for i in range(5)))

    (text,) = sentences(run, "bad")

    assert text.startswith("5 of 5 sites are stored")
    assert text.endswith("s2 (assigned 4, stored 8) and 2 more.")


def test_a_site_of_unknown_stored_width_is_not_called_stored() -> None:
    run = replace(RUN, sites=(SITE, replace(SITE, stored_bits=None)))

    assert sentences(run, "bad") == ["For 1 of 2 sites the assigned or the stored width is not known."]
    assert not any("All 2 sites" in text for text in sentences(run, "good"))


def test_a_mixed_network_better_than_float_gains() -> None:
    run = replace(RUN, mixed=Network(top1=92.73))

    assert any(
        text.startswith("The mixed network gains 1.00 points over the float")
        for text in sentences(run, "plain")
    )


def test_an_empty_run_has_a_verdict() -> None:
    assert sentences(Summary(), "good") == []
