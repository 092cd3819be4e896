"""What `calm quickstart` prints and writes when it is done: tables, `report.md`, `report.html` and their charts."""

from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from calm.report import html
from calm.report.quickstart_chart import NUM_COLOURS, ScorePoint, curves_chart, scores_chart
from calm.report.tables import brier_cell, brier_table, difference_cell, difference_table, differences, score_cell

CURVES = [
    ("calm", "first_cross_entropy", "CALM: cross-entropy of the first pass", 0),
    ("calm", "later_cross_entropy", "CALM: cross-entropy of later passes", 0),
    ("baseline", "loss", "baseline: cross-entropy", 2),
]
_STAGE_HEADINGS = ("stage", "steps", "tokens", "time")
_SCORE_HEADINGS = ("model", "BrierLM", "difference", "Brier-1", "Brier-2", "Brier-3", "Brier-4", "steps per token",
                   "training FLOPs", "tokens/s")  # fmt: skip


def show(results: dict, console: Console) -> None:
    """Print the continuations and the tables."""
    samples = _samples_by_prompt(results)
    for prompt, by_model in samples.items():
        for sample in by_model:
            text = Text.assemble((prompt, "bold"), sample["text"])
            console.print(Panel(text, title=_sample_title(results, sample), title_align="left"))
    console.print(brier_table(results["brier"], _terminal_costs(results)))
    if (differences_shown := difference_table(results["brier"])) is not None:
        console.print(differences_shown)
    stages = Table(title="Stages", box=None)
    for number, name in enumerate(_STAGE_HEADINGS):
        stages.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in _stage_rows(results):
        stages.add_row(*row)
    console.print(stages)


def write(results: dict, curves: dict[str, list[dict]], run: Path, command: str) -> Path:
    """Write ``report.html``, ``report.md`` and the charts of the latter; return the path of ``report.html``.

    Args:
        results: content of ``results.json``.
        curves: training records of every model.
        run: directory of the quickstart.
        command: shell command that continues a prompt with the trained model.
    """
    charts = {"scores": scores_chart(_points(results))}
    for model, key, title, colour in CURVES:
        points = [(record["step"], record[key]) for record in curves.get(model, []) if key in record]
        charts[f"{model}_{key}"] = curves_chart(title, points, colour)
    folder = run / "charts"
    folder.mkdir(exist_ok=True)
    for name, chart in charts.items():
        (folder / f"{name}.svg").write_text(chart, encoding="utf-8")
    (run / "report.md").write_text(_markdown(results, charts, command), encoding="utf-8")
    path = run / "report.html"
    path.write_text(_page(results, charts, command), encoding="utf-8")
    return path


def _points(results: dict) -> list[ScorePoint]:
    models = list(results["training"])
    return [
        ScorePoint(
            name,
            results["steps_per_token"][name],
            score["brier_lm"],
            score["brier_lm_error"],
            models.index(name) if name in models else NUM_COLOURS,
        )
        for name, score in results["brier"].items()
    ]


def _best_first(results: dict) -> list[str]:
    """Return the trained rows, the one with the best BrierLM first."""
    return sorted(results["training"], key=lambda name: -results["brier"][name]["brier_lm"])


def _samples_by_prompt(results: dict) -> dict[str, list[dict]]:
    order = _best_first(results)
    by_prompt: dict[str, list[dict]] = {}
    for sample in sorted(results["samples"], key=lambda sample: order.index(sample["model"])):
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    prompts = dict.fromkeys(sample["prompt"] for sample in results["samples"])
    return {prompt: by_prompt[prompt] for prompt in prompts}


def _sample_title(results: dict, sample: dict) -> str:
    score = score_cell(results["brier"][sample["model"]]["brier_lm"])
    sampler = f", sampler {sample['sampler']}" if sample["sampler"] == "direct" else ""
    return f"{sample['model']}{sampler}, T = {sample['temperature']:g} (BrierLM {score})"


def _stage_rows(results: dict) -> list[list[str]]:
    rows = [
        [
            stage["stage"],
            "" if stage["steps"] is None else f"{stage['steps']:,}",
            "" if stage["tokens"] is None else f"{stage['tokens']:,}",
            _time(stage["seconds"]),
        ]
        for stage in results["stages"]
    ]
    return [*rows, ["total", "", "", _time(_total_seconds(results))]]


def _total_seconds(results: dict) -> float:
    return sum(stage["seconds"] for stage in results["stages"])


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _terminal_costs(results: dict) -> dict[str, dict[str, str]]:
    return {
        name: dict(zip(("train\nFLOPs", "tokens/s"), cells, strict=True)) for name, cells in _costs(results).items()
    }


def _costs(results: dict) -> dict[str, tuple[str, str]]:
    costs = {}
    for name in results["brier"]:
        trained, speed = results["training"].get(name), results["generation_tokens_per_second"].get(name)
        costs[name] = (f"{trained['training_flops']:.1e}" if trained else "", f"{speed:,.0f}" if speed else "")
    return costs


def _score_rows(results: dict) -> list[list[str]]:
    apart, costs = differences(results["brier"]), _costs(results)
    return [
        [
            name,
            brier_cell(score),
            difference_cell(apart[name]) if name in apart else "",
            *map(score_cell, score["brier"]),
            f"{results['steps_per_token'][name]:g}",
            *costs[name],
        ]
        for name, score in results["brier"].items()
    ]


def _texts(results: dict) -> dict[str, str]:
    """Return the sentences that both reports have."""
    tokens = next(iter(results["training"].values()))["tokens"]
    score, trip = results["brier"]["CALM"], results["round_trip"]
    return {
        "summary": "Text: the source of Python's standard library, without tables and copies. CALM and the baseline "
        f"read the same {tokens:,} tokens. Asked for {results['minutes']:g} minutes, took "
        f"{_time(_total_seconds(results))}. Seed {results['seed']}.",
        "chart": f"CALM predicts {results['patch_size']} tokens per step of its backbone, the baseline one. BrierLM "
        "judges the next one to four tokens by samples, so that both are scored by the same rule. \"CALM\" samples "
        "with its head, \"CALM, MTP decoding\" with the multi-token prediction of the same backbone.",
        "samples": "The first continuation of each model, not a selection. Models are ordered by BrierLM, the best "
        f"first. Temperature {results['samples'][0]['temperature']:g}; every text begins with its prompt.",
        "round_trip": f"The {trip['kind']} turns every patch of {results['patch_size']} tokens into one vector of "
        f"{len(trip['vector'])} numbers and back. In this line of held-out text {trip['num_correct']} of "
        f"{trip['num_tokens']} tokens come back.",
        "scores": "BrierLM is 100 times the geometric mean of Brier-1 to Brier-4. ± is one standard error; that of "
        "the difference to the first model is taken block by block, and is smaller. Measured at "
        f"{score['num_positions']:,} positions in {score['num_blocks']} held-out blocks of {score['block_size']} "
        f"tokens, one every {score['stride']} tokens, with {score['num_samples']} samples each. Tokens/s: temperature "
        "1, batch 8.",
        "next": "Continue a prompt of your own:",
    }  # fmt: skip


def _page(results: dict, charts: dict[str, str], command: str) -> str:
    texts, trip = _texts(results), results["round_trip"]
    sections = [
        f"<h1>CALM quickstart</h1>{html.paragraph(texts['summary'], muted=True)}",
        html.heading("Quality against steps"),
        html.card(charts["scores"]),
        html.paragraph(texts["chart"], muted=True),
        html.heading("Continuations"),
        html.paragraph(texts["samples"], muted=True),
    ]
    for prompt, samples in _samples_by_prompt(results).items():
        cards = [
            f"<strong>{escape(_sample_title(results, sample))}</strong>{html.code(sample['text'], prompt)}"
            for sample in samples
        ]
        sections.append(html.columns(cards) + "<br>")
    patches = "".join(f'<span class="patch">{escape(patch)}</span>' for patch in trip["patches"])
    sections += [
        html.heading("Text to vectors and back"),
        html.paragraph(texts["round_trip"], muted=True),
        html.card(
            f"<strong>patches</strong><pre>{patches}</pre><br><strong>vector of the first patch</strong>"
            f"{html.code(_vector(trip))}<br><strong>decoded</strong>{html.code(trip['decoded'])}"
        ),
        html.heading("Scores"),
        html.table(_SCORE_HEADINGS, _score_rows(results)),
        html.paragraph(texts["scores"], muted=True),
        html.heading("Stages"),
        html.table(_STAGE_HEADINGS, _stage_rows(results)),
        html.heading("Learning curves"),
        html.columns([chart for name, chart in charts.items() if name != "scores"]),
        html.heading("Next"),
        html.paragraph(texts["next"]),
        html.card(html.code(command)),
    ]
    return html.page("CALM quickstart", sections)


def _vector(trip: dict) -> str:
    return (
        "[" + ", ".join(f"{value:g}" for value in trip["vector"][:8]) + (", ...]" if len(trip["vector"]) > 8 else "]")
    )


def _markdown(results: dict, charts: dict[str, str], command: str) -> str:
    texts, trip = _texts(results), results["round_trip"]
    lines = ["# CALM quickstart", "", texts["summary"], "", "The same with everything in one file: `report.html`.", ""]
    lines += ["## Quality against steps", "", "![scores](charts/scores.svg)", "", texts["chart"], ""]
    lines += ["## Continuations", "", texts["samples"], ""]
    for prompt, samples in _samples_by_prompt(results).items():
        for sample in samples:
            lines += [f"{_sample_title(results, sample)}:", "", "```python", prompt + sample["text"], "```", ""]
    lines += ["## Text to vectors and back", "", texts["round_trip"], ""]
    lines += ["```text", "patches:  " + "|".join(trip["patches"]), f"vector:   {_vector(trip)}"]
    lines += [f"decoded:  {trip['decoded']}", "```", "", "## Scores", ""]
    lines += [*_markdown_table(_SCORE_HEADINGS, _score_rows(results)), "", texts["scores"], "", "## Stages", ""]
    lines += [*_markdown_table(_STAGE_HEADINGS, _stage_rows(results)), "", "## Learning curves", ""]
    lines += [f"![{name}](charts/{name}.svg)" for name in charts if name != "scores"]
    lines += ["", "## Next", "", texts["next"], "", "```bash", command, "```", ""]
    return "\n".join(lines)


def _markdown_table(headings: Any, rows: list[list[str]]) -> list[str]:
    head = f"| {' | '.join(headings)} |"
    return [head, "|---|" + "---:|" * (len(headings) - 1), *(f"| {' | '.join(row)} |" for row in rows)]
