"""SIGTERM and Ctrl-C end a run at its next step, with a checkpoint."""

import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

_HEELS = 2.0  # seconds
_sheltered: int | None = None  # the process that leaves its signals to the Trainer


def leave_signals_to_the_trainer() -> None:
    """In a worker of a data loader: what ends the run is the Trainer's to hear. A scheduler, `timeout` or Ctrl-C signal
    all processes, and a worker that dies of it would take the run along before its checkpoint. What the Trainer's own
    process sends ends a worker, as it must: Python ends its children so."""
    global _sheltered
    if get_worker_info() is None or _sheltered == os.getpid() or not hasattr(signal, "sigwaitinfo"):
        return
    _sheltered = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for threads that begin later, too
    threading.Thread(target=_end_for_the_parent_alone, daemon=True).start()


def _end_for_the_parent_alone() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class TrainingInterruptedError(InterruptedError):
    """A run was asked to stop, and did; ``signal`` is the number of the signal."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped after step {step}, with a checkpoint; run the same command again to go on.")
        self.signal = signal_number


class InterruptionCallback(TrainerCallback):
    """Asks the Trainer for a checkpoint and an end once a signal has arrived in any of the processes.

    A second signal acts as it always does, at once; not so one that follows at its heels, as where a scheduler signals
    all processes and a launcher passes its own on.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._since = 0.0
        self._group: Any = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Of processor memory, so that no step waits for its accelerator to agree with the others.
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        received = self.signal or 0
        if self._group is not None:
            flag = torch.tensor(received)
            dist.all_reduce(flag, dist.ReduceOp.MAX, self._group)
            received = int(flag)
        if received:
            if self.signal is None:
                self.signal, self._since = received, time.monotonic()
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Let signals act as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _HEELS:
            self.restore()
            signal.raise_signal(number)
