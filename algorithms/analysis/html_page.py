"""Our pages, each one file: light and dark, visible focus, nothing from the network.

What a page looks like stands in `templates/`: `frame.html` is what all of them share.
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
    """A whole page.

    Args:
        template: Name of a file in `templates/` that extends `frame.html`.
        **values: What it names; `title` always, and `policy`, what the browser may load and run, if that is limited.
            Texts are escaped, all but those that are a `markupsafe.Markup` already.
    """
    return _TEMPLATES.get_template(template).render({"policy": None, **values})
