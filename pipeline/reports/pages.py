"""The one Jinja environment of all pages: escaped, and strict about names."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sentei.pipeline.reports.wording import FILTERS


def render_template(file_name: str, /, **values: Any) -> str:
    """Fill the template of that file; a value that it names and nobody gave is an error."""
    environment = Environment(
        loader=PackageLoader("sentei.pipeline.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment.get_template(file_name).render(**values)
