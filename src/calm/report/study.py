"""The report of a study, from what its models left behind: tables, plots, samples; `calm report`."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from calm.report.rows import plot_rows
from calm.report.scatter import Panel, plot_panels
from calm.report.tables import brier_cell, difference_cell, differences, score_cell

PLAN, SCORE, REPORT = "plan.yaml", "score.json", "report.md"
WITHOUT_HEAD = ":mtp"  # after the name of a model in a plan: its samples from multi-token prediction
FORMER_SUFFIX = ":token_prediction"
_COSTS = {
    "total_flops": "training FLOPs, autoencoder included",
    "inference_flops_per_token": "FLOPs per generated token",
}


def write_report(run: str | os.PathLike) -> Path:
    """Write ``report.md`` and its plots into the directory of a study; models that are not done yet are left out."""
    run = Path(run)
    if not (run / PLAN).is_file():
        raise ValueError(f"no study in {run}: {PLAN} is missing; `calm study` makes it.")
    # The plans of former releases have the former suffix.
    plan = yaml.safe_load((run / PLAN).read_text(encoding="utf-8").replace(FORMER_SUFFIX, WITHOUT_HEAD))
    labels = {name: model.get("label", name) for name, model in plan["models"].items()}
    scores = {name: json.loads(path.read_text()) for name in labels if (path := run / name / SCORE).exists()}
    for name in [name for name, score in scores.items() if score.get("token_prediction")]:
        scores[name + WITHOUT_HEAD] = scores[name] | scores[name]["token_prediction"] | {"token_prediction": None}
        labels[name + WITHOUT_HEAD] = f"{labels[name]}, token prediction"
    if not scores:
        raise ValueError(f"no model of the study in {run} is done yet: no {SCORE} in it.")
    sections = plan["report"] or [{"title": "All models", "rows": list(labels)}]
    lines = ["# Study", "", _protocol(scores, labels), ""]
    for number, section in enumerate(sections, start=1):
        lines += [f"## {section['title']}", "", *([section["text"].strip(), ""] if "text" in section else [])]
        drawn = {line: [n for n in names if n in scores] for line, names in section.get("lines", {}).items()}
        if any(drawn.values()):
            panels = _panels(section["title"], drawn, scores, labels)
            lines += _plot(section["title"], run / f"plot_{number}.png", partial(plot_panels, panels))
        elif len(compared := [n for n in section.get("rows", []) if "brier" in scores.get(n, {})]) > 1:
            draw = partial(plot_rows, *_points({name: scores[name] for name in compared}, labels))
            lines += _plot(section["title"], run / f"plot_{number}.png", draw)
        rows = [*section.get("rows", []), *(name for names in drawn.values() for name in names)]
        lines += _tables({name: scores[name] for name in dict.fromkeys(rows) if name in scores}, labels)
    lines += _fluency(run, labels)
    (run / REPORT).write_text("\n".join(lines), encoding="utf-8")
    return run / REPORT


def _plot(title: str, path: Path, draw: Callable[[Path], None]) -> list[str]:
    """Draw a plot and say where it is; where matplotlib is missing, say so."""
    try:
        draw(path)
    except ImportError:
        return ["(Plots need matplotlib: install `calm-lm[report]`.)", ""]
    return [f"![{title}]({path.name})", ""]


def _protocol(scores: dict[str, dict], labels: dict[str, str]) -> str:
    scored: dict[str, list[str]] = {}
    for name, score in scores.items():
        if "brier" in score:
            protocol = (
                f"{score['num_positions']:,} n-grams in {score['num_blocks']:,} held-out blocks of "
                f"{score['block_size']} tokens, one every {score['stride']} tokens, with {score['num_samples']} draws "
                f"(text {score['data_sha256'][:12]})"
            )
            scored.setdefault(protocol, []).append(labels[name])
    if not scored:
        return ""
    if len(scored) == 1:
        on = f"Language models are scored on {next(iter(scored))}."
    else:
        each = "; ".join(f"{', '.join(names)}: {protocol}" for protocol, names in scored.items())
        on = f"**Not all language models are scored alike, and scores compare within a group only.** {each}."
    return (
        f"{on} ± is one standard error, from 32 blocks on. A difference, where there is one, is to the first model of "
        "the table; its error is smaller, because a block that is hard for one model is hard for all. FLOPs count "
        "the whole way to a model: its autoencoder, and what its backbone was taken from. Token prediction: "
        "BrierLM, and Brier-1, of texts that it draws in the place of the head, where it was trained."
    )


def _panels(title: str, drawn: dict[str, list[str]], scores: dict[str, dict], labels: dict[str, str]) -> list[Panel]:
    return [
        Panel(
            f"{title}: BrierLM",
            meaning,
            "BrierLM",
            {
                line: sorted(
                    (scores[name][key], scores[name]["brier_lm"], label)
                    for name, label in zip(names, _apart([labels[name] for name in names]), strict=True)
                )
                for line, names in drawn.items()
            },
            log_x=True,
        )
        for key, meaning in _COSTS.items()
    ]


def _points(scores: dict[str, dict], labels: dict[str, str]) -> tuple[list[tuple[str, float, float | None]], str]:
    """What a plot of rows shows, and what it is; with the errors of the differences to the first, if all are known."""
    errors = {name: score["brier_lm_error"] for name, score in scores.items()}
    what, apart = "BrierLM", differences(scores)
    if len(apart) == len(scores) - 1:
        errors = dict.fromkeys(scores) | {name: error for name, (_, error) in apart.items()}
        if any(errors.values()):
            what = "BrierLM; bars: one standard error of the difference to the first"
    return [(labels[name], score["brier_lm"], errors[name]) for name, score in scores.items()], what


def _apart(labels: list[str]) -> list[str]:
    """Labels of one line without what all of them begin with: the legend says that."""
    parts = [label.split(", ") for label in labels]
    common = 0
    while len(parts) > 1 and all(len(part) > common + 1 for part in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return [", ".join(part[common:]) for part in parts]


def _tables(scores: dict[str, dict], labels: dict[str, str]) -> list[str]:
    language_models = {name: score for name, score in scores.items() if score["stage"] != "autoencoder"}
    autoencoders = {name: score for name, score in scores.items() if score["stage"] == "autoencoder"}
    lines = []
    if autoencoders:
        lines += _table(
            ("autoencoder", "K", "from mean", "from sample", "noise 0.3", "KL (nats)", "live", "parameters", "FLOPs"),
            [
                (
                    labels[name], score["patch_size"], f"{score['token_accuracy_mean']:.3%}",
                    f"{score['token_accuracy_sample']:.3%}", f"{score['token_accuracy_with_noise']['0.3']:.2%}",
                    f"{score['kl']:.1f}", f"{score['live_dimensions']}/{score['latent_size']}",
                    f"{score['parameters']:,}", f"{score['total_flops']:.2g}",
                )
                for name, score in autoencoders.items()
            ],
        )  # fmt: skip
    if language_models:
        apart = differences(language_models)
        lines += _table(
            ("model", "BrierLM", "difference", "Brier-1", "Brier-2", "Brier-3", "Brier-4", "accuracy-1", "collision-1",
             "token prediction", "its Brier-1", "training FLOPs", "FLOPs per token", "parameters", "tokens"),
            [
                (
                    labels[name], brier_cell(score), difference_cell(apart[name]) if name in apart else "",
                    *map(score_cell, score["brier"]), score_cell(score["accuracy"][0]),
                    score_cell(score["collision"][0]), *_token_prediction(score), f"{score['total_flops']:.2g}",
                    f"{score['inference_flops_per_token']:.2g}", f"{score['parameters']:,}", f"{score['tokens']:,}",
                )
                for name, score in language_models.items()
            ],
        )  # fmt: skip
    return lines


def _token_prediction(score: dict[str, Any]) -> tuple[str, str]:
    """BrierLM and Brier-1 without the head, where that is not what the row shows anyway."""
    of_tokens = score.get("token_prediction")
    return (brier_cell(of_tokens), score_cell(of_tokens["brier"][0])) if of_tokens else ("", "")


def fluency_path(run: Path, name: str) -> Path:
    """Where the judged texts of a model lie; of its token prediction, with ``WITHOUT_HEAD`` behind its name."""
    model = name.removesuffix(WITHOUT_HEAD)
    return run / model / ("fluency.json" if model == name else "fluency_token_prediction.json")


def _fluency(run: Path, labels: dict[str, str]) -> list[str]:
    judged = [("the documents", [json.loads((run / "text.json").read_text())])] if (run / "text.json").exists() else []
    for name, label in labels.items():
        path = fluency_path(run, name)
        if path.exists():
            judged.append((label, json.loads(path.read_text())))
    if not judged:
        return []
    rows: list[tuple[Any, ...]] = []
    samples: list[str] = []
    for label, results in judged:
        for each in results:
            temperature = "" if each["temperature"] is None else f"{each['temperature']:.3g}"
            rate = "" if each["tokens_per_second"] is None else f"{each['tokens_per_second']:,.0f}"
            distinct = (f"{value:.1%}" for value in each["distinct"].values())
            rows.append((label, temperature, f"{each['perplexity']:.1f}", f"{each['repetition']:.1%}", *distinct, rate))
            heading = label + (f", T = {temperature}" if temperature else "")
            samples += [f"### {heading}", ""]
            for sample in each["samples"]:
                samples += ["```text", f"{sample['prompt']}▸{sample['text']}".replace("```", "'''"), "```", ""]
    header = ("texts of", "T", "judge's perplexity", "repetition", "distinct-1", "distinct-2", "distinct-4", "tokens/s")
    first = judged[0][1][0]
    about = (
        f"{first['num_texts']} texts that continue the beginnings of held-out blocks; repetition is the share of "
        "4-grams that stand in the same text before, distinct-n the share of different n-grams over all texts."
    )
    return ["## Texts", "", about, "", *_table(header, rows), "## Samples", "", "The first prompts; ▸ is where the "
            "model goes on.", "", *samples]  # fmt: skip


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    align = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(str(cell) for cell in row)} |" for row in (header, align, *rows)] + [""]
