"""A live line for a training run: step, loss, rate, time left; plain lines where there is no terminal."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

_SECONDS_BETWEEN_LINES = 10


def make_progress(console: Console | None = None, disable: bool = False) -> Progress:
    """The progress display that commands share."""
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console or Console(stderr=True),
        disable=disable,
    )


class ProgressCallback(TrainerCallback):
    """Shows a Trainer's run as one task of a rich progress display."""

    def __init__(self, progress: Progress, description: str):
        self.progress = progress
        self.description = description
        self._last_line = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.task = self.progress.add_task(
            self.description, total=state.max_steps, completed=state.global_step, note=""
        )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or "loss" not in logs:
            return
        shown = {name: logs[name] for name in ("loss", "accuracy", "energy_score") if name in logs}
        note = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown.items())
        note += f"  {logs.get('tokens_per_second', 0):,.0f} tokens/s"
        self.progress.update(self.task, note=note)
        console = self.progress.console
        if not console.is_terminal and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            console.print(f"{self.description}  step {state.global_step}/{state.max_steps}  {note}", highlight=False)
