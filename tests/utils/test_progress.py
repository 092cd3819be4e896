"""Progress as a terminal of 80 columns and a log file show it."""

import io

import pytest
from rich.console import Console

from calm.utils.progress import make_progress

NOTE = "loss 1.234  energy score 0.123  1,234 tokens/s"


@pytest.mark.parametrize("width", [60, 80, 140])
def test_step_elapsed_and_remaining_time_are_never_cut(width):
    out = io.StringIO()
    with make_progress(Console(file=out, width=width, force_terminal=True, color_system=None)) as progress:
        task = progress.add_task("score finished (token_prediction)", total=1181, note=NOTE)
        progress.update(task, completed=41)
    last = [line for line in out.getvalue().splitlines() if "41/1181" in line][-1]
    assert "41/1181 0:00:00 left -:--:--" in last
    assert "loss" in last


def test_without_a_terminal_a_task_prints_a_line_when_it_is_complete():
    out = io.StringIO()
    with make_progress(Console(file=out, width=80)) as progress:
        task = progress.add_task("score runs/calm", total=3, note=NOTE)
        for _ in range(3):
            progress.advance(task)
        progress.update(task, note="")  # no further step, no further line
    lines = [line for line in out.getvalue().splitlines() if line.startswith("score")]
    assert lines == [f"score runs/calm  3/3  {NOTE}"]
