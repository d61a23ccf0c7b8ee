"""Policy: a grid for every site; besides weights all that finetuning, lowering and exports read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mixbits.core.grid import Grid, Uniform, grid_from_json, grid_to_json
from mixbits.core.profile import Profile, unknown_site


@dataclass(frozen=True)
class Policy:
    """Grids by site name.

    >>> from mixbits.core.grid import Uniform
    >>> Policy({"conv1.weight": Uniform(3, signed=True)}).bits
    {'conv1.weight': 3}
    """

    grids: Mapping[str, Grid]

    @property
    def bits(self) -> dict[str, int]:
        """Widths by site name."""
        return {name: grid.bits for name, grid in self.grids.items()}

    def check(self, profile: Profile) -> None:
        """Raise ``ValueError`` unless every site of ``profile``, and no other, has a grid that fits it."""
        names = [site.name for site in profile.sites]
        for name, grid in self.grids.items():
            if name not in names:
                raise unknown_site(name, names)
            # Levels of a codebook were learned; of values that could be negative and are not, none need be.
            if profile.site(name).signed and not grid.signed and isinstance(grid, Uniform):
                raise ValueError(
                    f"{name}: the grid is unsigned, but the tensor has negative values; use signed=true"
                )
        missing = [name for name in names if name not in self.grids]
        if missing:
            raise ValueError(
                f"the policy gives no width to {len(missing)} of {len(names)} sites, the first is "
                f"{missing[0]!r}; add an entry for each (`mixbits profile` lists all sites)"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read back by :func:`policy_from_json`."""
        return {
            "format": "mixbits-policy",
            "version": 1,
            "sites": {name: grid_to_json(grid) for name, grid in self.grids.items()},
        }


def policy_from_json(entry: Any) -> Policy:
    """The policy of a parsed JSON object; raises ``ValueError`` naming the site at fault."""
    fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    if fields.get("format") != "mixbits-policy":
        raise ValueError('not a policy: an object with "format": "mixbits-policy" is expected')
    version, sites = fields.get("version"), fields.get("sites")
    if version != 1:
        raise ValueError(f"policy version {version!r} is not known here; this mixbits reads version 1")
    if not isinstance(sites, dict):
        raise ValueError('a policy has an object "sites": {site name: grid}')
    grids: dict[str, Grid] = {}
    for name, grid in cast("dict[str, Any]", sites).items():
        try:
            grids[name] = grid_from_json(grid)
        except ValueError as error:
            raise ValueError(f"site {name!r}: {error}") from None
    return Policy(grids)


def read_policy(path: Path) -> Policy:
    """The policy in a JSON file; errors name the file."""
    try:
        return policy_from_json(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); write a policy as `mixbits learn` does"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
