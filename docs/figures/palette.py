"""The colours and elements that all figures share. Every figure is drawn for light and for dark pages."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
FONT = "-apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
MONOSPACE = "ui-monospace, 'SF Mono', Menlo, 'Liberation Mono', monospace"


@dataclass(frozen=True)
class Theme:
    """Colours of one theme; blue, orange and green are distinct for all common kinds of colour blindness."""

    name: str
    text: str
    muted: str
    line: str
    box: str
    blue: str
    orange: str
    green: str
    grey: str


LIGHT = Theme("light", "#1f2328", "#59636e", "#59636e", "#f6f8fa", "#0072b2", "#d55e00", "#009e73", "#8c959f")
DARK = Theme("dark", "#f0f6fc", "#9198a1", "#9198a1", "#21262d", "#56b4e9", "#e69f00", "#2fbf95", "#7d8590")
THEMES = (LIGHT, DARK)


def text(
    x: float, y: float, content: str, colour: str, size: float = 14, anchor: str = "start", style: str = ""
) -> str:
    content = content.replace("&", "&amp;").replace("<", "&lt;")
    position = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {position} fill="{colour}" font-size="{size:g}" {style}>{content}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", style: str = "") -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{stroke}" '
        f'stroke-width="1.5" {style}/>'
    )


def arrow(path: str, colour: str, style: str = "") -> str:
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5" marker-end="url(#tip)" {style}/>'


def write(name: str, theme: Theme, width: int, height: int, title: str, elements: list[str]) -> None:
    """Write ``docs/figures/NAME-THEME.svg``."""
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{theme.line}"/></marker></defs>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="{FONT}"><title>{title}</title>'
    )
    path = FOLDER / f"{name}-{theme.name}.svg"
    path.write_text("\n".join([head, tip, *elements, "</svg>"]) + "\n", encoding="utf-8")
