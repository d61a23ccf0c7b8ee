"""Page: a template of this package filled in, and written so that no reader sees half."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from mixbits.core.files import whole_file
from mixbits.report import words
from mixbits.report.svg import THEME, WIDTH_COLOURS


def fill(template: str, **values: Any) -> str:
    """The page of a template, which knows the theme and how numbers are written."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(
            lambda name: files("mixbits.report").joinpath(name).read_text(encoding="utf-8")
        ),
    )
    environment.filters |= {"amount": words.amount, "bits": words.bits, "count": words.count}
    environment.filters |= {"fixed": words.fixed, "share": words.share, "unbroken": words.unbroken}
    environment.filters["measured"] = lambda value, measure: words.MEASURES[measure](value)
    return environment.get_template(template).render(theme=THEME, width_colours=WIDTH_COLOURS, **values)


def write_page(path: Path, page: str) -> Path:
    """Write a page; an older one is replaced in one step."""
    with whole_file(path) as file:
        file.write(page.encode())
    return path
