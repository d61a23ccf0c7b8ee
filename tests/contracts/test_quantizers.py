"""Quantizers: what is trained is exactly what ``freeze`` says, and training can go on from anywhere."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from inspect import isabstract

import pytest
import torch
from torch import Tensor

import mixbits.methods
import mixbits.quant
from mixbits.core.grid import Codebook, Uniform, dequantize, describe, quantize
from mixbits.methods.bmpq import Clipped, SwitchedWeight
from mixbits.methods.ddq import LearnedLevels, start_gates
from mixbits.methods.ebs import MetaWeight, Mixture, Strengths
from mixbits.methods.mpdnn import LearnedWidth, as_parameters
from mixbits.methods.sdq import DBP, EntropyStep, StochasticWidth
from mixbits.quant.observe import Recorder, mse_step
from mixbits.quant.quantizer import LearnedStep, Quantizer
from strategies import UNIFORM_GRIDS

# LearnedWidth rounds halves away from zero, as its paper does, a grid to even; between powers of two it
# halves logarithms, where a grid compares with square roots. Values this near a threshold, in levels or
# octaves, are left out.
NEAR_A_TIE = 1e-3

NOT_COVERED = {Recorder: "it watches values, has no grid, and is replaced before anything trains"}

CODEBOOKS = (
    Codebook(1, (-1, 2)),
    Codebook(2, (0, 1, 4)),
    Codebook(3, (-8, -4, -2, -1, 1, 2, 4, 8)),
    Codebook(3, (0, 1, 2, 4), (0.7, 1.4, 2.8)),
    Codebook(8, tuple(range(-128, 127, 3))),
)


def learned_step(grid) -> Callable[[], Quantizer]:
    return lambda: LearnedStep(grid, torch.tensor(0.3), shared_by=100)


def learned_width(parametrization, signed: bool, bits: int, q_max: float) -> Callable[[], Quantizer]:
    step = q_max / (2 ** (bits - signed) - 1)
    first, second = as_parameters(parametrization, step, q_max, bits)
    least = 2 if signed or parametrization.startswith("p") else 1
    return lambda: LearnedWidth(parametrization, first, second, signed=signed, least_bits=least)


def drawn_width(place: int, *, bipolar: bool) -> Callable[[], Quantizer]:
    def make() -> Quantizer:
        dbp = DBP((1, 2, 4), [0.0] * 3, start=0.9, temperature=1.0)
        dbp.active.fill_(place)
        grids = [Uniform(b, signed=bipolar, form="bipolar" if bipolar else "full") for b in dbp.widths]
        return StochasticWidth(dbp, grids, torch.tensor([0.9, 0.4, 0.1]), shared_by=100)

    return make


def learned_levels(signed: bool, bits: int) -> Callable[[], Quantizer]:
    generator = torch.Generator().manual_seed(bits)
    levels = torch.rand(2**6, generator=generator).sort().values * 255 - (128 if signed else 0)
    return lambda: LearnedLevels(
        levels,
        start_gates(bits, 6),
        torch.tensor(0.01),
        signed=signed,
        keeps_zero=True,
        least_bits=1,
        shared_by=100,
        power=1000.0,
        correction=1.0,
    )


def switched_weight(scale, bits: int) -> Callable[[], Quantizer]:
    return lambda: SwitchedWeight(bits, torch.linspace(-0.9, 0.7, 90).reshape(9, 10), scale=scale)


def clipped(signed: bool, bits: int) -> Callable[[], Quantizer]:
    return lambda: Clipped(bits, torch.tensor(1.2), signed=signed)


# A fixed grid with a learned step, and learned widths: on the grid (.875, 1) and off it (1.15).
FIXED = {
    f"step, {describe(grid)} {i}": learned_step(grid) for i, grid in enumerate(UNIFORM_GRIDS + CODEBOOKS)
}
# Widths that are drawn have in eval() the grid that they have reached.
FIXED |= {
    f"drawn, {'signed' if bipolar else 'unsigned'}, {width} bit": drawn_width(place, bipolar=bipolar)
    for bipolar in (True, False)
    for place, width in ((1, 2), (2, 4))
}
FIXED |= {
    f"entropy, {bits} bit": lambda bits=bits: EntropyStep(Uniform(bits, signed=True, form="bipolar"), 0.3)
    for bits in (1, 2, 7)
}
FIXED |= {
    f"switched weight, {scale}, {bits} bit": switched_weight(scale, bits)
    for scale in ("learned", "max")
    for bits in range(1, 9)
}
FIXED |= {
    f"clipped, {'signed' if signed else 'unsigned'}, {bits} bit": clipped(signed, bits)
    for signed in (True, False)
    for bits in range(1, 9)
}
LEARNED = {
    f"{parametrization}, {'signed' if signed else 'unsigned'}, {bits} bit, {q_max}": learned_width(
        parametrization, signed, bits, q_max
    )
    for parametrization in ("u1", "u2", "u3", "p1", "p2", "p3")
    for signed in (True, False)
    for bits, q_max in ((2, 1.0), (3, 1.15), (8, 0.875))
}
LEVELS = {
    f"levels, {'signed' if signed else 'unsigned'}, {bits} of 6 bit": learned_levels(signed, bits)
    for signed in (True, False)
    for bits in (2, 3, 6)
}


def mixture(signed: bool, best: int) -> Callable[[], Mixture]:
    """A mixture whose largest strength is that of the width ``best``."""

    def make() -> Mixture:
        strengths = Strengths((1, 2, 3, 5, 8))
        with torch.no_grad():
            strengths.value.copy_(2.0 * (strengths.bits == best))
        return Mixture(strengths, 0.7, signed=signed, shared_by=100)

    return make


MIXED = {
    f"mixture, {'signed' if signed else 'unsigned'}, {bits} bit": mixture(signed, bits)
    for signed in (True, False)
    for bits in (1, 2, 3, 8)
}
# They quantize a function of their input, so the laws about the input itself are the mixture's alone.
TRANSFORMED = {
    f"meta weight, {bits} bit": lambda bits=bits: MetaWeight(mixture(True, bits)()) for bits in (1, 2, 3, 8)
}
DIRECT = FIXED | LEARNED | LEVELS | MIXED
QUANTIZERS = DIRECT | TRANSFORMED

each_direct = pytest.mark.parametrize("make", DIRECT.values(), ids=DIRECT)
each_mixed = pytest.mark.parametrize("make", (MIXED | TRANSFORMED).values(), ids=MIXED | TRANSFORMED)
each_quantizer = pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)
each_fixed = pytest.mark.parametrize("make", FIXED.values(), ids=FIXED)
each_learned = pytest.mark.parametrize("make", (LEARNED | LEVELS).values(), ids=LEARNED | LEVELS)
each_exact = pytest.mark.parametrize("make", (FIXED | LEVELS | MIXED).values(), ids=FIXED | LEVELS | MIXED)


def concrete(parent: type[Quantizer]) -> Iterator[type[Quantizer]]:
    for child in parent.__subclasses__():
        yield from concrete(child)
        if not isabstract(child):
            yield child


def dense(quantizer: Quantizer) -> Tensor:
    """Values from far below to far above every range: every level, every tie, and between."""
    between = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 4
    return torch.cat([torch.arange(-600, 600, 0.125), between]) * quantizer.freeze().step


def without_ties(x: Tensor, step: Tensor) -> Tensor:
    """The values that are not near the middle of two multiples, or powers of two, of ``step``."""
    size = (x / step).abs()
    octave = torch.log2(size.clamp_min(0.1))
    return x[((size % 1 - 0.5).abs() > NEAR_A_TIE) & ((octave % 1 - 0.5).abs() > NEAR_A_TIE)]


def reference(quantizer: Quantizer, x: Tensor) -> Tensor:
    frozen = quantizer.freeze()
    step = frozen.step.reshape(-1, *[1] * (x.dim() - 1)).numpy() if frozen.step.dim() else frozen.step.numpy()
    return torch.from_numpy(dequantize(quantize(x.numpy(), step, frozen.grid), step, frozen.grid))


def test_every_quantizer_class_is_under_this_contract():
    """Those of methods may be: what a method learns with is also looked at in ``test_methods.py``."""
    for package in (mixbits.quant, mixbits.methods):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")

    covered = {type(make()) for make in QUANTIZERS.values()} | set(NOT_COVERED)
    found = {kind for kind in concrete(Quantizer) if kind.__module__.startswith("mixbits.quant.")}

    assert found <= covered


@each_exact
def test_a_quantizer_computes_the_definition_ties_included(make):
    quantizer = make().eval()
    x = dense(quantizer)

    assert torch.equal(quantizer(x), reference(quantizer, x))


@each_learned
def test_a_learned_width_computes_the_definition_but_for_ties(make):
    quantizer = make().eval()
    x = without_ties(dense(quantizer), quantizer.freeze().step)

    assert torch.equal(quantizer(x), reference(quantizer, x))


def test_a_step_per_channel_computes_the_definition():
    generator = torch.Generator().manual_seed(0)
    x, step = torch.randn(5, 3, 2, 2, generator=generator), torch.rand(5, 1, 1, 1, generator=generator) + 0.1
    quantizer = LearnedStep(UNIFORM_GRIDS[0], step, shared_by=12)

    assert quantizer.freeze().step.tolist() == step.flatten().tolist()
    assert torch.equal(quantizer(x), reference(quantizer, x))


@each_quantizer
def test_every_output_is_a_value_of_the_frozen_grid(make):
    quantizer = make().eval()
    frozen = quantizer.freeze()
    allowed = torch.tensor(frozen.grid.levels) * frozen.step

    assert torch.isin(quantizer(dense(quantizer)), allowed).all()


@each_direct
def test_every_value_of_the_frozen_grid_is_an_output(make):
    quantizer = make().eval()
    frozen = quantizer.freeze()
    allowed = torch.tensor(frozen.grid.levels) * frozen.step

    assert torch.equal(quantizer(allowed), allowed)


@each_direct
def test_quantizing_twice_is_quantizing_once(make):
    quantizer = make().eval()

    once = quantizer(dense(quantizer))

    assert torch.equal(quantizer(once), once)


@each_quantizer
def test_the_width_is_that_of_the_frozen_grid(make):
    quantizer = make().eval()
    frozen = quantizer.freeze()

    assert quantizer.bits().item() == frozen.grid.bits
    assert quantizer.bits().dim() == 0
    assert frozen.step.dtype == torch.float32
    assert frozen.step.item() > 0


@each_quantizer
@pytest.mark.parametrize("place", [0.0, 1.0, 1.5, 1e4], ids=["zero", "the clip", "beyond", "far beyond"])
def test_gradients_are_finite(make, place):
    quantizer = make().train()
    frozen = quantizer.freeze()
    ends = torch.tensor([frozen.grid.level_min, frozen.grid.level_max]) * frozen.step
    x = (place * ends).requires_grad_()

    quantizer(x).sum().backward()

    grads = [x.grad, *(p.grad for p in quantizer.parameters())]
    assert all(torch.isfinite(grad).all() for grad in grads if grad is not None)


@each_quantizer
def test_every_parameter_learns_from_values_inside_and_beyond_the_range(make):
    quantizer = make().train()
    # Weights that differ, so that equal and opposite gradients of two values do not cancel.
    x = dense(quantizer).requires_grad_()
    (quantizer(x) * torch.linspace(1, 2, len(x))).sum().backward()

    silent = {name for name, p in quantizer.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    # Powers of two within a byte end at 4 bits: a wider width adds no level that values could learn from.
    ended = (
        isinstance(quantizer, LearnedWidth)
        and quantizer.parametrization in ("p1", "p2")
        and quantizer.bits() > 3
    )
    assert silent == ({"first"} if ended else set())


@each_learned
def test_gradient_of_the_width_reaches_the_parameters(make):
    quantizer = make()
    least = quantizer.bits().item() == quantizer.least_bits

    quantizer.bits().backward()

    grads = [p.grad.abs().sum().item() for p in quantizer.parameters() if p.grad is not None]
    # A width inferred from two ranges stops at the least one; a width parameter is held by its bounds.
    assert (sum(grads) > 0) is (not least or quantizer.parametrization not in ("u3", "p3"))


@each_mixed
def test_gradient_of_an_expected_width_reaches_the_strengths_alone(make):
    quantizer = make().train()

    quantizer.bits().backward()

    reached = {name for name, p in quantizer.named_parameters() if p.grad is not None}
    assert {name.rpartition(".")[2] for name in reached} == {"value"}
    assert 1 < quantizer.bits().item() < 8


@each_fixed
def test_a_fixed_width_has_no_gradient(make):
    assert not make().bits().requires_grad


@each_quantizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_of_two_bytes_are_rounded_in_float32(make, dtype):
    quantizer = make().eval()
    x = (torch.linspace(-3, 3, 301) * quantizer.freeze().step).to(dtype)

    out = quantizer(x)

    assert out.dtype == dtype
    assert torch.equal(out, quantizer(x.float()).to(dtype))


@each_quantizer
def test_projection_keeps_what_is_legal(make):
    quantizer = make()
    before = {name: p.detach().clone() for name, p in quantizer.named_parameters()}

    quantizer.project_()

    assert all(torch.equal(p, before[name]) for name, p in quantizer.named_parameters())


def test_a_step_that_an_update_made_negative_is_positive_again():
    quantizer = LearnedStep(UNIFORM_GRIDS[0], torch.tensor([[0.1], [0.2]]), shared_by=2)
    with torch.no_grad():
        quantizer.step.copy_(torch.tensor([[-1.0], [0.2]]))

    quantizer.project_()

    assert (quantizer.step > 0).all()
    assert torch.isfinite(quantizer(torch.tensor([[1.0], [-1.0]]))).all()


def test_a_codebook_s_step_learns_at_the_pace_of_the_same_uniform_grid():
    grids = (Uniform(3, signed=True, form="narrow"), Codebook(3, tuple(range(-96, 97, 32))))
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    learned = []
    for grid, spacing in zip(grids, (1, 32), strict=True):
        quantizer = LearnedStep(grid, torch.tensor(0.4 / spacing), shared_by=500)
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
        (quantizer(x) * x).sum().backward()
        optimizer.step()
        learned.append(quantizer.step.item() * spacing)

    assert learned[0] != pytest.approx(0.4, rel=0.01)
    assert learned[1] == pytest.approx(learned[0], rel=1e-4)  # sums of float32 in another order


@pytest.mark.parametrize("levels", [(-4, -1, 0, 1), (-1, 0, 1, 4)], ids=["down", "up"])
def test_the_step_of_least_error_is_found_whichever_way_a_codebook_reaches_further(levels):
    values = 0.05 * torch.tensor(levels).repeat(9)[None]

    assert mse_step(values, Codebook(2, levels)).item() == pytest.approx(0.05)


def test_a_recorder_passes_values_on_and_keeps_an_even_sample():
    recorder = Recorder(batches=2)
    x = torch.arange(6.0).reshape(2, 3)

    assert recorder(x) is x
    recorder(x + 6)

    assert recorder.values().tolist() == list(range(12))
    with pytest.raises(ValueError, match="a recorder only watches values"):
        recorder.freeze()
