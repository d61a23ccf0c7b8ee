"""The instruction set: whatever passes the checks runs, in the shapes and the memory that the checks said."""

from __future__ import annotations

import numpy as np
import pytest

from mixbits.core.instructions import INSTRUCTIONS
from mixbits.runtime import Executor
from programs import LIMIT, SAMPLE, SEEDS, random_program


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_program_that_passes_the_checks_runs(seed):
    program = random_program(seed)
    executor = Executor(program, max_elements=LIMIT)
    rng = np.random.default_rng(seed)
    for batch in (1, 3, 2):  # the executor compares every shape with the inferred one
        try:
            executor.trace(rng.standard_normal((batch, *SAMPLE)).astype(np.float32))
        except ValueError as error:
            assert "NaN" in str(error)  # overflow in front of a quantizer


def test_random_programs_use_every_instruction():
    used = {step.op for seed in range(SEEDS) for step in random_program(seed).instructions}
    assert set(INSTRUCTIONS) - used == set()
