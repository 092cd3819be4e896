"""The reports of a quickstart: complete, ordered by score, and readable without anything beside them."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from calm.report.quickstart import write
from calm.report.quickstart_chart import ScorePoint, curves_chart, scores_chart

COMMAND = "/somewhere/.venv/bin/calm generate /somewhere/runs/quickstart/calm --prompt 'def '"
SCORES = {"CALM": 6.0, "CALM, MTP decoding": 5.5, "baseline": 8.0, "bigram": 0.5, "unigram": 0.0}
TRAINED = ["CALM", "CALM, MTP decoding", "baseline"]


def brier(score):
    return {
        "brier_lm": score, "brier_lm_error": 0.8, "brier": [score] * 4, "block_brier": [[score] * 4] * 40,
        "accuracy": [score] * 4, "collision": [score] * 4, "num_positions": 5000, "num_blocks": 40, "block_size": 256,
        "stride": 2, "num_samples": 8, "temperature": 1.0, "data_sha256": "0",
    }  # fmt: skip


@pytest.fixture
def results():
    return {
        "minutes": 8.0,
        "seed": 0,
        "patch_size": 2,
        "brier": {name: brier(score) for name, score in SCORES.items()},
        "steps_per_token": {"CALM": 0.5, "CALM, MTP decoding": 0.5, "baseline": 1, "bigram": 0, "unigram": 0},
        "training": {name: {"tokens": 2_048_000, "training_flops": 3e13} for name in TRAINED},
        "generation_tokens_per_second": dict.fromkeys(TRAINED, 2000.0),
        "samples": [
            {"model": name, "sampler": "direct" if name == "CALM" else None, "temperature": 0.5, "prompt": prompt,
             "text": f"continued by {name} <b>&"}
            for prompt in ("def f(", "import os\n") for name in TRAINED
        ],
        "round_trip": {"kind": "code table", "patches": ["de", "f <"], "vector": [0.25] * 32, "decoded": "def <",
                       "num_tokens": 4, "num_correct": 4},
        "stages": [
            {"stage": "corpus", "steps": None, "tokens": None, "seconds": 4.2},
            {"stage": "train CALM", "steps": 1000, "tokens": 2_048_000, "seconds": 200.0},
            {"stage": "train baseline", "steps": 1000, "tokens": 2_048_000, "seconds": 150.0},
        ],
    }  # fmt: skip


@pytest.fixture
def written(results, tmp_path):
    curves = {"calm": [{"step": step, "first_cross_entropy": 7 / step, "later_cross_entropy": 6 / step}
                       for step in range(1, 1000)],
              "baseline": [{"step": 10, "loss": 5.0}]}  # fmt: skip
    path = write(results, curves, tmp_path, COMMAND)
    assert path == tmp_path / "report.html"
    return tmp_path


class Page(HTMLParser):
    """Tags with attributes, and the text outside styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_loads_nothing_and_fits_a_phone(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "img", "iframe", "object")
        for name in ("src", "href", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 4


def test_both_reports_have_all_parts(written):
    markdown, page = (written / "report.md").read_text(), Page((written / "report.html").read_text())
    words = " ".join("".join(page.words).split())
    for part in ("6.00 ± 0.80", "2,048,000", "0:03:20", COMMAND, "4 of 4 tokens come back", "not a selection",
                 "Asked for 8 minutes, took 0:05:54"):  # fmt: skip
        assert part in markdown, part
        assert part in words, part
    assert "| train CALM | 1,000 | 2,048,000 | 0:03:20 |" in markdown
    for chart in re.findall(r"\((charts/.*?\.svg)\)", markdown):
        ElementTree.parse(written / chart)
    assert len(list((written / "charts").iterdir())) == 4


def test_continuations_are_ordered_by_score_and_show_markup_as_text(written):
    page = Page((written / "report.html").read_text())
    titles = [word for word in page.words if "(BrierLM" in word]
    assert titles[:3] == [
        "baseline, T = 0.5 (BrierLM 8.00)",
        "CALM, sampler direct, T = 0.5 (BrierLM 6.00)",
        "CALM, MTP decoding, T = 0.5 (BrierLM 5.50)",
    ]
    assert titles[3:] == titles[:3]
    assert "continued by baseline <b>&" in "".join(page.words)
    assert not any(tag == "b" for tag, _ in page.tags)


def test_labels_of_points_at_one_place_do_not_cover_each_other():
    points = [ScorePoint(name, 0.5, score, 0.3, number) for number, (name, score) in enumerate(SCORES.items())]
    labels = ElementTree.fromstring(scores_chart(points)).iter("{http://www.w3.org/2000/svg}text")
    heights = sorted(float(label.get("y")) for label in labels if label.get("class") == "label")
    assert len(heights) == 5
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 14


@pytest.mark.parametrize("points", [[], [(10, 5.0)], [(step, 0.0) for step in range(10_000)]])
def test_a_learning_curve_of_any_length_is_drawn(points):
    chart = curves_chart("loss", points, 0)
    ElementTree.fromstring(chart)
    assert len(chart) < 20_000


def test_scores_of_zero_are_drawn():
    ElementTree.fromstring(scores_chart([ScorePoint("CALM", 0.5, 0.0, None, 0)]))
