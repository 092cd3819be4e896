"""Progress as a terminal of 80 columns and a log file show it."""

import io
import re

import pytest
from rich.console import Console
from transformers import TrainerState

from calm.utils.progress import ProgressCallback, make_progress

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
    assert lines == [f"score runs/calm  3/3  0:00:00  {NOTE}"]


def test_without_a_terminal_a_slow_task_prints_elapsed_and_remaining_time():
    out, seconds = io.StringIO(), iter(range(0, 10_000, 5))
    console = Console(file=out, width=80, get_time=lambda: float(next(seconds)))
    with make_progress(console, seconds_between_lines=0) as progress:
        task = progress.add_task("train CALM", total=10, note="")
        for _ in range(4):
            progress.advance(task)
    assert any(
        re.match(r"train CALM  [34]/10  0:0\d:\d\d left 0:0\d:\d\d", line) for line in out.getvalue().splitlines()
    )


def test_parts_of_a_run_are_one_task():
    """A task that begins again with more steps keeps its line."""
    out = io.StringIO()
    with make_progress(Console(file=out, width=80)) as progress:
        task = None
        for begin, end in ((0, 2), (2, 4)):
            callback = ProgressCallback(progress, "train CALM", total=4, task=task)
            state = TrainerState(max_steps=end, global_step=begin)
            callback.on_train_begin(None, state, None)
            state.global_step = end
            callback.on_train_end(None, state, None)
            assert callback.first_step == begin
            task = callback.task
    lines = [line for line in out.getvalue().splitlines() if line.startswith("train CALM")]
    assert lines == ["train CALM  4/4  0:00:00"]
