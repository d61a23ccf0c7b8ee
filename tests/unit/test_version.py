"""One version: the package says it, the changelog explains it."""

from __future__ import annotations

import re
from pathlib import Path

import mixbits

CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"


def test_the_top_version_of_the_changelog_is_the_packages():
    versions = re.findall(r"^## \[([^\]]+)\]", CHANGELOG.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions[0] == mixbits.__version__
