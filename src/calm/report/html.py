"""A page of HTML in one file: styles inside, pictures as inline SVG, nothing loaded from elsewhere."""

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --page: #f9f9f7; --surface: #fcfcfb; --text: #0b0b0b; --muted: #52514e;
  --border: rgba(11, 11, 11, .12); --mark: #dceafb; }
@media (prefers-color-scheme: dark) { :root { --page: #0d0d0d; --surface: #1a1a19; --text: #fff; --muted: #c3c2b7;
  --border: rgba(255, 255, 255, .14); --mark: #12365f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 36px 0 8px; }
p { margin: 8px 0; max-width: 75ch; }
.muted { color: var(--muted); font-size: .9rem; }
.card { background: var(--surface); border: 1px solid var(--border); border-radius: 8px; padding: 12px; min-width: 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px; }
.columns > .card { display: flex; flex-direction: column; }
.chart { display: block; width: 100%; max-width: 680px; height: auto; margin: 0 auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--border); }
th { color: var(--muted); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
pre, code { font-family: ui-monospace, monospace; font-size: .84rem; }
pre { margin: 8px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
.patch { border: 1px solid var(--border); border-radius: 3px; padding: 0 2px; margin: 0 1px; white-space: pre; }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """Return a complete page from pieces of HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        "<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, muted: bool = False) -> str:
    return f"<p{' class=muted' if muted else ''}>{escape(text)}</p>"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that scrolls by itself where the page is too narrow for it."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def columns(cards: Sequence[str]) -> str:
    """Return cards side by side, or one after the other where the page is narrow."""
    return '<div class="columns">' + "".join(f'<div class="card">{card}</div>' for card in cards) + "</div>"


def card(content: str) -> str:
    return f'<div class="card">{content}</div>'


def code(text: str, prompt: str = "") -> str:
    """Return a block of code; the prompt before it is marked."""
    marked = f"<mark>{escape(prompt)}</mark>" if prompt else ""
    return f"<pre>{marked}{escape(text)}</pre>"
