"""Progress of commands: live lines in a terminal (step, elapsed and remaining time, loss), plain lines elsewhere."""

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback

_SECONDS_BETWEEN_LINES = 10
_WIDE_TERMINAL = 120  # columns; narrower ones get a short bar


def make_progress(
    console: Console | None = None, disable: bool = False, seconds_between_lines: float = _SECONDS_BETWEEN_LINES
) -> "CommandProgress":
    """Return the progress display that commands share.

    In a narrow terminal the description and the note are cut; step, elapsed and remaining time are always whole.

    Args:
        console: where it is shown; default: the standard error.
        disable: show nothing.
        seconds_between_lines: time between two lines of a task where there is no terminal.
    """
    console = console or Console(stderr=True)
    return CommandProgress(
        SpinnerColumn(),
        _CutColumn("[bold]{task.description}"),
        BarColumn(bar_width=40 if console.width >= _WIDE_TERMINAL else 10),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("left", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _CutColumn("[dim]{task.fields[note]}"),
        console=console,
        disable=disable,
        seconds_between_lines=seconds_between_lines,
    )


class _CutColumn(TextColumn):
    """Text on one line that is cut with an ellipsis where the terminal is too narrow.

    rich takes width first from columns that may wrap; this one may, and its text does not.
    """

    def __init__(self, text_format: str):
        super().__init__(text_format, table_column=Column(no_wrap=False, overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class CommandProgress(Progress):
    """A rich progress display that prints lines of text where there is no terminal.

    A task gets a line when it is complete, and one every ``seconds_between_lines`` until then. A line has the steps,
    the elapsed time, the remaining time where it is known, and the note.
    """

    def __init__(self, *columns: Any, seconds_between_lines: float = _SECONDS_BETWEEN_LINES, **options: Any):
        super().__init__(*columns, **options)
        self.seconds_between_lines = seconds_between_lines
        self._line_at: dict[TaskID, float] = {}

    def add_task(self, description: str, *arguments: Any, **fields: Any) -> TaskID:
        task = super().add_task(description, *arguments, **fields)
        self._line_at[task] = time.monotonic()
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        before = self._tasks[task_id].completed
        super().advance(task_id, advance)
        self._print_line(task_id, before)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        before = self._tasks[task_id].completed
        super().update(task_id, **changes)
        self._print_line(task_id, before)

    def _print_line(self, task_id: TaskID, before: float) -> None:
        task = self._tasks[task_id]
        if self.console.is_terminal or self.disable or task.completed == before:
            return
        ends = task.total is not None and task.completed >= task.total
        if ends or time.monotonic() - self._line_at[task_id] > self.seconds_between_lines:
            self._line_at[task_id] = time.monotonic()
            total = "?" if task.total is None else f"{task.total:.0f}"
            line = f"{task.description}  {task.completed:.0f}/{total}  {_times(task)}  {task.fields.get('note', '')}"
            self.console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def _times(task: Task) -> str:
    elapsed = task.finished_time if task.finished else task.elapsed
    times = duration(elapsed or 0)
    if not task.finished and task.time_remaining is not None:
        times += f" left {duration(task.time_remaining)}"
    return times


class ProgressCallback(TrainerCallback):
    """Show a Trainer's run as one task of a progress display.

    Args:
        progress: the display.
        description: name of the task.
        total: steps of the task, if the run is only a part of it; default: the steps of the run.
        task: a task that an earlier part of the run has begun.

    Attributes:
        task: the task, once training has begun.
        first_step: steps before this part of the run.
    """

    def __init__(self, progress: Progress, description: str, total: int | None = None, task: TaskID | None = None):
        self.progress = progress
        self.description = description
        self.total = total
        self.task = task
        self.first_step = 0
        self.begun = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.begun, self.first_step = True, state.global_step
        total = self.total or state.max_steps
        if self.task is None:
            self.task = self.progress.add_task(self.description, total=total, completed=state.global_step, note="")
        else:
            self.progress.update(self.task, total=total, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        assert self.task is not None
        # The last step is shown at the end, with the note of its log.
        if state.global_step < state.max_steps:
            self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        assert self.task is not None
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or "loss" not in logs:
            return
        shown = {name: logs[name] for name in ("loss", "accuracy", "energy_score") if name in logs}
        note = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown.items())
        note += f"  {logs.get('tokens_per_second', 0):,.0f} tokens/s"
        assert self.task is not None
        self.progress.update(self.task, note=note)
