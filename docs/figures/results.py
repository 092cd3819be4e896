"""Draw the results of docs/results/small_scale.md: ``python docs/figures/results.py``."""

from palette import THEMES, Theme, box, text, write

# Backbone 128 x 3, three passes over the text: label, BrierLM, training FLOPs, colour.
ROWS = [
    ("token model", 16.13, "6.7e13", "grey"),
    None,
    ("K = 2, categorical flow head", 14.01, "1.2e14", "blue"),
    ("multi-token prediction, same model", 13.49, "", "orange"),
    ("energy head, fine-tuned", 8.85, "1.1e14", "green"),
    None,
    ("K = 4, categorical flow head", 9.75, "8.5e13", "blue"),
    ("multi-token prediction, same model", 9.31, "", "orange"),
    ("energy head, fine-tuned", 5.12, "7.5e13", "green"),
]
LEFT, SCALE = 284, 23


def draw(theme: Theme) -> None:
    elements = [
        text(LEFT, 22, "BrierLM (higher is better)", theme.text, 14, style='font-weight="600"'),
        text(780, 22, "training FLOPs", theme.muted, 13, "end"),
    ]
    y = 38
    for row in ROWS:
        if row is None:
            y += 12
            continue
        label, score, cost, colour = row
        elements.append(text(LEFT - 10, y + 16, label, theme.text, 14, "end"))
        elements.append(box(LEFT, y, score * SCALE, 22, getattr(theme, colour)))
        elements.append(
            text(LEFT + score * SCALE + 8, y + 16, f"{score:.2f}", theme.text, 14, style='font-weight="600"')
        )
        elements.append(text(780, y + 16, cost, theme.muted, 13, "end"))
        y += 28
    write(
        "results", theme, 800, y + 6, "BrierLM of heads and of a token model after three passes of the text", elements
    )


for theme in THEMES:
    draw(theme)
