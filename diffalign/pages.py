"""The templates of diffalign/templates, rendered; a page is one file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from diffalign.writing import write_text


def templates(**options: Any) -> jinja2.Environment:
    """Where templates come from; one that names a value that it is not given is an error. `options` are jinja2's."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)


def write_html(path: Path, template: str, **values: Any) -> None:
    """Renders a template, with every value escaped, and writes it in one piece."""
    write_text(path, templates(autoescape=True).get_template(template).render(values))
