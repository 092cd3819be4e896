"""Progress of commands: live lines in a terminal (step, elapsed and remaining time, loss), plain lines elsewhere."""

import time
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


def make_progress(console: Console | None = None, disable: bool = False) -> "CommandProgress":
    """Return the progress display that commands share.

    In a narrow terminal the description and the note are cut; step, elapsed and remaining time are always whole.
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

    Every task gets a line when it is complete, and one every 10 seconds until then.
    """

    def __init__(self, *columns: Any, **options: Any):
        super().__init__(*columns, **options)
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
        if ends or time.monotonic() - self._line_at[task_id] > _SECONDS_BETWEEN_LINES:
            self._line_at[task_id] = time.monotonic()
            total = "?" if task.total is None else f"{task.total:.0f}"
            line = f"{task.description}  {task.completed:.0f}/{total}  {task.fields.get('note', '')}"
            self.console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)


class ProgressCallback(TrainerCallback):
    """Show a Trainer's run as one task of a progress display."""

    def __init__(self, progress: Progress, description: str):
        self.progress = progress
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.task = self.progress.add_task(
            self.description, total=state.max_steps, completed=state.global_step, note=""
        )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # The last step is shown at the end, with the note of its log.
        if state.global_step < state.max_steps:
            self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or "loss" not in logs:
            return
        shown = {name: logs[name] for name in ("loss", "accuracy", "energy_score") if name in logs}
        note = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown.items())
        note += f"  {logs.get('tokens_per_second', 0):,.0f} tokens/s"
        self.progress.update(self.task, note=note)
