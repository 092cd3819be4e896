"""The plan of a quickstart: how many steps fit into a time budget, planned again after every round of training.

The models that are compared take turns. In every round each of them trains the same number of steps, so that both have
read the same tokens whenever training ends. After a round, the number of remaining steps follows from the seconds per
step of that round and the time that is left: on a machine that has become slower the run is cut, on a faster one it is
extended. The learning rate is constant after the warm-up. In the last rounds it falls on a line to zero, which ends at
the last step, wherever that is.

All functions here are arithmetic on given seconds; nothing reads a clock.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

NUM_ROUNDS = 8
NUM_DECAY_ROUNDS = 3  # the last ones
MIN_STEPS = 100  # fewer steps teach a model nothing that is worth a comparison
MIN_ROUND_STEPS = 20  # every round loads and saves both models
MIN_DECAY_SHARE = 0.1  # steps of the decay as a share of the steps before, where the time is used up
WARMUP_STEPS = 40  # within the first round
# What the stages around training take, in units of one training step of all models together, measured on two cores.
# Both slow down together on a busy machine.
STAGE_UNITS = {"corpus": 14, "tokenizer": 12, "token files": 25, "scores": 80, "speed and samples": 40}
BEFORE_TRAINING = ("corpus", "tokenizer", "token files")
AFTER_TRAINING = ("scores", "speed and samples")
MIN_SCORES_SHARE = 0.15  # of the usual number of blocks: where the time is short, fewer are scored
MAX_AFTER_TRAINING_SHARE = 0.3  # of the time budget
MAX_OVERTIME = 1.25  # of the time budget: a longer run is refused before it begins


@dataclass(frozen=True)
class Round:
    """One round of training, the same for every model.

    Attributes:
        start: steps that every model has taken before.
        end: steps that every model has taken afterwards.
        planned_steps: steps of the whole run, as planned before this round.
        start_rate: learning rate at its start, as a share of the recipe's.
        end_rate: learning rate at its end. The rate is linear in the steps; 0 ends the run.
    """

    start: int
    end: int
    planned_steps: int
    start_rate: float = 1.0
    end_rate: float = 1.0

    @property
    def is_last(self) -> bool:
        return self.end_rate == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)

    def schedule(self) -> dict[str, Any]:
        """Return the settings of transformers' ``warmup_stable_decay`` that have this round's learning rates.

        Its line begins at rate 1. That of a round within the decay is extended to before the round's start, so it may
        begin before the warm-up ends, and then its number of stable steps is negative.
        """
        num_decay_steps = 0.0
        if self.end_rate < self.start_rate:
            num_decay_steps = (self.end - self.start) * (1 - self.end_rate) / (self.start_rate - self.end_rate)
        decays = num_decay_steps > 0
        return {
            "num_decay_steps": num_decay_steps,
            "min_lr_ratio": self.end_rate if decays else 0.0,
            "decay_type": "linear",
        }


def next_round(rounds: Sequence[Round], seconds_left: float, seconds_per_step: float) -> Round | None:
    """Plan the next round, or return None if training is complete.

    Args:
        rounds: rounds that are complete.
        seconds_left: time that is left for training; it may be negative.
        seconds_per_step: time of one step of every model together.
    """
    start, rate = (rounds[-1].end, rounds[-1].end_rate) if rounds else (0, 1.0)
    if rate == 0:
        return None
    steps = math.floor(max(0.0, seconds_left) / seconds_per_step)
    # The decay is never left out. Once it has begun, a few steps end it.
    fewest = MIN_ROUND_STEPS if rate < 1 else max(MIN_ROUND_STEPS, math.ceil(start * MIN_DECAY_SHARE))
    planned = max(start + steps, start + fewest, MIN_STEPS)
    rounds_left = max(1, NUM_ROUNDS - len(rounds))
    smallest = MIN_ROUND_STEPS if rounds else max(MIN_ROUND_STEPS, WARMUP_STEPS + 1)
    end = min(planned, start + max(smallest, math.ceil((planned - start) / rounds_left)))
    if planned - end < MIN_ROUND_STEPS or steps <= fewest:
        end = planned
    is_decay = rounds_left <= NUM_DECAY_ROUNDS or end == planned or rate < 1
    end_rate = rate * (planned - end) / (planned - start) if is_decay else 1.0
    return Round(start, end, planned, rate, end_rate)


def rates_at(rounds: Sequence[Round], step: int, num_warmup_steps: int) -> float:
    """Return the learning rate of a step (0, 1, ...) as a share of the recipe's."""
    if step < num_warmup_steps:
        return step / num_warmup_steps
    for planned in rounds:
        if planned.start <= step < planned.end:
            passed = (step - planned.start) / (planned.end - planned.start)
            return planned.start_rate + passed * (planned.end_rate - planned.start_rate)
    return 0.0


def seconds_for(stages: Sequence[str], seconds_per_step: float) -> float:
    """Return what stages other than training take, judged by the seconds of one step of all models together."""
    return seconds_per_step * sum(STAGE_UNITS[stage] for stage in stages)


def seconds_after_training(budget: float, seconds_per_step: float) -> float:
    """Return the time to keep for the stages after training."""
    return min(seconds_for(AFTER_TRAINING, seconds_per_step), MAX_AFTER_TRAINING_SHARE * budget)


def check_budget(budget: float, seconds_per_step: float) -> None:
    """Raise ValueError if a time budget (in seconds) does not suffice for the shortest run on this machine."""
    needed = seconds_for(BEFORE_TRAINING, seconds_per_step) + MIN_STEPS * seconds_per_step
    needed += STAGE_UNITS["scores"] * MIN_SCORES_SHARE * seconds_per_step
    needed += STAGE_UNITS["speed and samples"] * seconds_per_step
    if needed > MAX_OVERTIME * budget:
        minutes = math.ceil(needed / MAX_OVERTIME / 6) / 10
        raise ValueError(
            f"--minutes {budget / 60:g} is too short: {MIN_STEPS} training steps, the fewest worth a comparison, and "
            f"the stages around them need {minutes:g} at the present speed of this machine; give --minutes "
            f"{minutes:g} or more."
        )


def blocks_to_score(seconds_left: float, seconds_per_block: float, num_blocks: int) -> int:
    """Return how many blocks all models are scored on: as many as the time allows, within bounds."""
    fewest = math.ceil(MIN_SCORES_SHARE * num_blocks)
    return min(num_blocks, max(fewest, math.floor(max(0.0, seconds_left) / seconds_per_block)))
