"""What laws are tried on: grids, steps, arrays, and small profiles."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mixbits.core.grid import Codebook, Grid, Uniform
from mixbits.core.profile import Op, Profile, Site, Value

UNIFORM_GRIDS: tuple[Uniform, ...] = tuple(
    Uniform(bits, signed, form)
    for bits in range(1, 9)
    for signed, form in ((False, "full"), (True, "full"), (True, "narrow"), (True, "bipolar"))
    if form != "narrow" or bits > 1
)


def uniform_grids() -> st.SearchStrategy[Uniform]:
    """Every uniform grid there is."""
    return st.sampled_from(UNIFORM_GRIDS)


@st.composite
def codebooks(draw: st.DrawFn) -> Codebook:
    """Codebooks of 1 to 8 bits with their edges at midpoints."""
    bits, (low, high) = draw(st.integers(1, 8)), draw(st.sampled_from([(-128, 127), (0, 255)]))
    levels = draw(st.sets(st.integers(low, high), min_size=2, max_size=1 << bits))
    return Codebook(bits, tuple(sorted(levels)))


def grids() -> st.SearchStrategy[Grid]:
    """Uniform grids and codebooks."""
    return st.one_of(uniform_grids(), codebooks())


def powers_of_two() -> st.SearchStrategy[float]:
    """Steps by which a division is exact, so that a law about rounding needs no tolerance."""
    return st.integers(-20, 10).map(lambda exponent: 2.0**exponent)


def steps() -> st.SearchStrategy[np.float32]:
    """Any step between a millionth and a thousand."""
    return st.floats(2.0**-20, 2.0**10, width=32).map(np.float32)


def ratios() -> st.SearchStrategy[np.ndarray]:
    """Float32 arrays of any shape in units of a step: within, at and beyond the levels of every grid."""
    values = st.one_of(
        st.floats(-600, 600, width=32),
        st.integers(-1200, 1200).map(lambda n: n / 2),
        st.floats(-4, 4, width=32),
    )
    return hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=8), elements=values
    )


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Chains of one to four layers, now and then with a skip, so that activations live for different times."""
    count = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 200), min_size=2 * count, max_size=2 * count))
    sites, ops, values = [], [], []
    for index in range(count):
        name = f"layer{index}"
        read = "input" if index == 0 else f"{name}/relu"
        last = min(index + draw(st.integers(1, 3)), count)
        sites += [
            Site(read, "activation", (sizes[2 * index],), signed=index == 0, readers=(name,)),
            Site(f"{name}.weight", "weight", (sizes[2 * index + 1],), signed=True, readers=(name,)),
        ]
        positions, channels, reduction = (draw(st.integers(1, most)) for most in (30, 80, 400))
        macs = positions * channels * reduction
        ops.append(Op(name, "linear", macs, f"{name}.weight", read, channels, reduction))
        values.append(Value(read, sizes[2 * index], read, first=index, last=last))
    values.append(Value("logits", draw(st.integers(1, 10)), None, first=count, last=count))
    return Profile(
        (sizes[0],), tuple(sites), tuple(ops), tuple(values), stored_floats=draw(st.integers(0, 50))
    )
