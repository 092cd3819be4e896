"""Draw the figure of the method: ``python docs/figures/method.py``."""

from palette import MONOSPACE, THEMES, Theme, arrow, box, text, write

BOLD = 'font-weight="600"'
CODE = f'font-family="{MONOSPACE}"'


def patch(theme: Theme, x: float, y: float, tokens: list[str], colour: str, width: float = 40) -> list[str]:
    elements = []
    for i, token in enumerate(tokens):
        elements.append(box(x + i * (width + 3), y, width, 28, theme.box, colour))
        elements.append(
            text(
                x + i * (width + 3) + width / 2,
                y + 19,
                token,
                theme.text,
                10 if len(token) > 5 else 11.5,
                "middle",
                CODE,
            )
        )
    return elements


def vector(theme: Theme, x: float, y: float) -> list[str]:
    shades = (0.9, 0.35, 0.65, 0.2, 0.8, 0.5, 0.3, 0.7)
    return [box(x + 15 * i, y, 13, 22, theme.orange, style=f'fill-opacity="{s}"') for i, s in enumerate(shades)]


def stage(theme: Theme, x: float, y: float, width: float, height: float, name: str, note: str = "") -> list[str]:
    middle = y + height / 2 + (5 if not note else -3)
    elements = [
        box(x, y, width, height, theme.box, theme.line),
        text(x + width / 2, middle, name, theme.text, 14, "middle", BOLD),
    ]
    if note:
        elements.append(text(x + width / 2, middle + 17, note, theme.muted, 12, "middle"))
    return elements


def draw(theme: Theme) -> None:
    elements = [
        text(20, 24, "1  Autoencoder: K tokens become one vector, and back (here K = 4)", theme.text, 14, style=BOLD)
    ]
    elements += patch(theme, 20, 45, ["def", " main", "(", ")"], theme.blue)
    elements.append(arrow("M196 59H228", theme.line))
    elements += stage(theme, 232, 42, 90, 34, "encoder")
    elements.append(arrow("M326 59H358", theme.line))
    elements += vector(theme, 364, 48)
    elements.append(arrow("M488 59H520", theme.line))
    elements += stage(theme, 524, 42, 90, 34, "decoder")
    elements.append(arrow("M618 59H650", theme.line))
    elements += patch(theme, 656, 45, ["def", " main", "(", ")"], theme.blue)

    elements.append(text(20, 124, "2  Language model: one step per patch, not per token", theme.text, 14, style=BOLD))
    patches = [["import", "os", "⏎", "⏎"], ["def", "main", "(", ")"], [":", "⏎", "␣␣", "return"]]
    for i, tokens in enumerate(patches):
        x = 20 + 186 * i
        elements += patch(theme, x, 320, tokens, theme.blue)
        elements.append(arrow(f"M{x + 84} 314V252", theme.line))
    elements.append(text(112, 288, "embed", theme.muted, 12))
    elements += stage(
        theme, 20, 176, 541, 70, "backbone", "a causal transformer; one position is one patch of K tokens"
    )
    elements.append(arrow("M565 211H600", theme.line))
    elements += stage(theme, 604, 150, 268, 60, "head", "energy, diffusion, flow, categorical flow")
    elements.append(text(738, 126, "random numbers", theme.muted, 12, "middle"))
    elements.append(arrow("M738 132V146", theme.line))
    elements.append(arrow("M738 214V222", theme.line))
    elements += vector(theme, 679, 227)
    elements.append(text(806, 243, "next vector", theme.orange, 12, style=BOLD))
    elements.append(arrow("M738 252V260", theme.line))
    elements += stage(theme, 683, 264, 110, 34, "decoder")
    elements.append(arrow("M738 301V315", theme.line))
    elements += patch(theme, 654, 320, ["os", ".", "getcwd", "()"], theme.green)
    elements.append(arrow("M648 334H572", theme.line, 'stroke-dasharray="4 4"'))
    elements.append(text(610, 326, "append", theme.muted, 12, "middle"))
    write("method", theme, 892, 366, "How a CALM writes: patches of tokens, backbone, head, vector, decoder", elements)


for theme in THEMES:
    draw(theme)
