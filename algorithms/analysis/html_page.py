"""Writes our pages. A page is one file with a light and a dark look, visible focus and nothing from the network.

The folder `templates/` says what a page looks like; all pages share `frame.html`.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=PackageLoader("algorithms.analysis"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(template: str, **values: Any) -> str:
    """Return a whole page.

    Args:
        template: Name of a file in `templates/` that extends `frame.html`.
        **values: Variables of the template. `title` is needed; `policy` limits what the browser may load and run.
            Texts are escaped unless they are a `markupsafe.Markup`.
    """
    return _TEMPLATES.get_template(template).render({"policy": None, **values})
