"""The templates of diffalign/templates, rendered; a page is one file that needs nothing else."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from diffalign.writing import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


def templates(**options: Any) -> jinja2.Environment:
    """Where templates come from; one that names a value that it is not given is an error. `options` are jinja2's."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)


def write_html(path: Path, template: str, **values: Any) -> None:
    """Renders a template, with every value escaped, and writes it in one piece."""
    write_text(path, templates(autoescape=True).get_template(template).render(values))


def picture_uri(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """A picture inside of the page; `options` are those of Pillow's writer."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def figure_uri(figure: Figure) -> str:
    """A figure of matplotlib inside of the page, as SVG."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue().encode()).decode()
