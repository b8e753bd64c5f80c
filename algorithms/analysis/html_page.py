"""The frame and the look that all our pages share: light and dark, visible focus, nothing from the network."""

from __future__ import annotations

import html

_STYLE = """
:root { color-scheme: light dark;
        --ink: #222; --soft: #666; --line: #d8d8d8; --page: #fff; --band: #f5f5f3; --link: #0b57a4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --soft: #a8a8a8; --line: #3b3e43; --page: #16181b; --band: #1e2125; --link: #7db8f0 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem } h3 { font-size: 1rem }
a { color: var(--link) } nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; list-style: none }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
.skip { position: absolute; left: -99rem } .skip:focus { position: static }
.findings { border-left: 4px solid #e69f00; background: var(--band); padding: .6rem 1rem .6rem 2rem; margin: 1rem 0;
            overflow-wrap: anywhere }
"""


def document(title: str, style: str, body: str, policy: str = "") -> str:
    """A whole page with all that it needs in it.

    Args:
        title: Of the window, plain text.
        style: Rules after those that all our pages have.
        body: Markup.
        policy: What the browser may load and run; empty: whatever it likes.
    """
    guard = f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">\n' if policy else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{guard}<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
