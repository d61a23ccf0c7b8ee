"""Policies: a file that people write and diff, and its fit to a network."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbits.core.grid import Codebook, Uniform
from mixbits.core.policy import Policy, policy_from_json, read_policy
from mixbits.core.profile import Op, Profile, Site, profile_from_json
from strategies import grids

PROFILE = Profile(
    input_shape=(1, 8, 8),
    sites=(
        Site("input", "activation", (1, 8, 8), signed=True, readers=("conv1",)),
        Site("conv1.weight", "weight", (4, 1, 3, 3), signed=True, readers=("conv1",)),
        Site("relu", "activation", (4, 6, 6), signed=False, readers=("linear",)),
        Site("linear.weight", "weight", (10, 144), signed=True, readers=("linear",)),
    ),
    ops=(
        Op("conv1", "conv2d", 1296, "conv1.weight", "input", channels=4, reduction=9),
        Op("linear", "linear", 1440, "linear.weight", "relu", channels=10, reduction=144),
    ),
    values=(),
    stored_floats=30,
)
GRIDS = {
    "input": Uniform(8, signed=True),
    "conv1.weight": Uniform(3, signed=True, form="narrow"),
    "relu": Uniform(4, signed=False),
    "linear.weight": Codebook(2, (-4, -1, 1, 4)),
}

WRONG_FILES = {
    "not JSON": ("{", "not valid JSON"),
    "a list": ("[]", 'not a policy: an object with "format": "mixbits-policy"'),
    "another format": ('{"format": "mixbits-profile", "version": 1}', "not a policy"),
    "another version": (
        '{"format": "mixbits-policy", "version": 2, "sites": {}}',
        "policy version 2 is not known",
    ),
    "no sites": ('{"format": "mixbits-policy", "version": 1}', 'a policy has an object "sites"'),
    "wrong grid": (
        '{"format": "mixbits-policy", "version": 1, "sites": {"relu": {"bits": 12, "signed": false}}}',
        "site 'relu': a grid of 12 bits does not exist",
    ),
}


def without(name: str) -> dict[str, object]:
    return {site: grid for site, grid in GRIDS.items() if site != name}


def test_a_policy_with_a_grid_for_every_site_fits():
    Policy(GRIDS).check(PROFILE)


def test_a_policy_survives_a_file(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(Policy(GRIDS).to_json()), encoding="utf-8")

    read = read_policy(path)

    assert read == Policy(GRIDS)
    assert list(read.grids) == list(GRIDS)
    assert read.bits == {"input": 8, "conv1.weight": 3, "relu": 4, "linear.weight": 2}


@given(st.dictionaries(st.text(max_size=20), grids(), max_size=5))
def test_any_policy_survives_json(by_name):
    assert policy_from_json(json.loads(json.dumps(Policy(by_name).to_json()))) == Policy(by_name)


@pytest.mark.parametrize(("text", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_file_that_is_no_policy_is_named_with_its_fault(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ValueError, match=rf"mine\.json: .*{message}"):
        read_policy(path)


def test_an_unknown_site_is_answered_with_the_nearest_name():
    policy = Policy({**without("conv1.weight"), "conv.weight": Uniform(3, signed=True)})

    with pytest.raises(ValueError, match=r"unknown site 'conv\.weight'.*Did you mean 'conv1\.weight'"):
        policy.check(PROFILE)


def test_a_name_like_no_site_is_answered_with_the_first_ones():
    policy = Policy({**GRIDS, "zzz": Uniform(3, signed=True)})

    with pytest.raises(ValueError, match="unknown site 'zzz'.*Did you mean 'input'"):
        policy.check(PROFILE)


def test_missing_sites_are_counted_and_the_first_is_named():
    policy = Policy({"input": GRIDS["input"], "relu": GRIDS["relu"]})

    with pytest.raises(ValueError, match=r"no width to 2 of 4 sites, the first is 'conv1\.weight'"):
        policy.check(PROFILE)


def test_an_unsigned_grid_for_a_signed_tensor_is_refused():
    with pytest.raises(ValueError, match="^input: the grid is unsigned, but the tensor has negative values"):
        Policy({**GRIDS, "input": Uniform(4, signed=False)}).check(PROFILE)


def test_the_levels_of_a_codebook_are_as_they_were_learned():
    Policy({**GRIDS, "input": Codebook(2, (0, 1, 2))}).check(PROFILE)


def test_a_signed_grid_for_an_unsigned_tensor_is_allowed():
    Policy({**GRIDS, "relu": Uniform(4, signed=True)}).check(PROFILE)


def test_a_profile_survives_json():
    assert profile_from_json(json.dumps(PROFILE.to_json())) == PROFILE
