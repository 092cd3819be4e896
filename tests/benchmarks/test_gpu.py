"""The GPU benchmark runs from end to end on a CPU, so that it works when a GPU is at hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def run(monkeypatch, path, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "-o", str(path), "--tiny", "--device", "cpu", *arguments])
    gpu.main()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def test_every_correctness_row_passes(monkeypatch, tmp_path):
    results = run(monkeypatch, tmp_path / "gpu.json", "--only", "correctness")["correctness"]
    failed = {name: row for name, row in results.items() if not row.get("passed")}
    assert len(results) == 7
    assert not failed


def test_a_run_that_was_cut_measures_only_what_is_missing(monkeypatch, tmp_path):
    path = tmp_path / "gpu.json"
    assert run(monkeypatch, path, "--only", "generation", "--minutes", "0") == {}
    rows = [("first", lambda: {"value": 1.0}), ("second", lambda: 1 / 0)]
    monkeypatch.setitem(gpu.SECTIONS, "generation", lambda _: iter(rows))
    assert "ZeroDivisionError" in run(monkeypatch, path, "--only", "generation")["generation"]["second"]["error"]
    rows[:] = [("first", lambda: {"value": 2.0}), ("second", lambda: {"value": 3.0})]
    again = run(monkeypatch, path, "--only", "generation")["generation"]
    assert again == {"first": {"value": 1.0}, "second": {"value": 3.0}}


@pytest.mark.slow
@pytest.mark.parametrize("section", ["training", "generation"])
def test_every_row_of_the_table_runs(monkeypatch, tmp_path, section):
    results = run(monkeypatch, tmp_path / "gpu.json", "--only", section)[section]
    assert results
    assert not {name: row for name, row in results.items() if "error" in row}


def test_more_launches_take_longer_and_a_captured_step_is_bounded_by_its_bytes():
    assert gpu.predicted_seconds(700, 0, 0) == pytest.approx(4.9e-3)
    assert gpu.predicted_seconds(0, 4.08e9, 0, captured=100) == pytest.approx(1e-3)
    assert gpu.predicted_seconds(0, 0, 632e12, captured=100) == pytest.approx(1.0)
