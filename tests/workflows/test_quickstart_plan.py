"""The plan of a quickstart, with a machine whose speed the test chooses instead of a clock."""

import itertools

import pytest
import torch
from transformers import get_scheduler

from calm.workflows import quickstart_plan as planning
from calm.workflows.quickstart_plan import MIN_STEPS, WARMUP_STEPS, next_round, rates_at

BUDGET = 480.0
FAST = 0.25  # seconds per step of both models together: two idle cores


def carry_out(speed_at, budget=BUDGET, first_estimate=None):
    """Return the rounds of a run and the seconds when training ends; ``speed_at(seconds)`` is in seconds per step."""
    rounds, clock = [], 0.0
    per_step = first_estimate or speed_at(0)
    clock += planning.seconds_for(planning.BEFORE_TRAINING, per_step)
    while True:
        left = budget - clock - planning.seconds_after_training(budget, per_step)
        planned = next_round(rounds, left, per_step)
        if planned is None:
            return rounds, clock
        started = clock
        for _ in range(planned.start, planned.end):
            clock += speed_at(clock)
        per_step = (clock - started) / (planned.end - planned.start)
        rounds.append(planned)


MACHINES = {
    "steady": lambda _: FAST,
    "loaded throughout": lambda _: 5 * FAST,
    "slower from the middle on": lambda seconds: FAST if seconds < 200 else 4 * FAST,
    "faster from the middle on": lambda seconds: 4 * FAST if seconds < 200 else FAST,
    "slow in between": lambda seconds: 5 * FAST if 150 < seconds < 220 else FAST,
    "slower in the decay": lambda seconds: FAST if seconds < 330 else 4 * FAST,
}


@pytest.mark.parametrize("machine", MACHINES)
def test_training_ends_in_time_and_with_the_learning_rate_at_zero(machine):
    rounds, end = carry_out(MACHINES[machine])
    assert end < 1.2 * BUDGET
    assert rounds[0].start == 0
    assert rounds[0].end > WARMUP_STEPS
    assert all(before.end == after.start for before, after in itertools.pairwise(rounds))
    assert all(before.end_rate == after.start_rate for before, after in itertools.pairwise(rounds))
    assert rounds[-1].end >= MIN_STEPS
    assert [planned.is_last for planned in rounds] == [False] * (len(rounds) - 1) + [True]
    assert rounds[-1].end == rounds[-1].planned_steps


def test_a_run_that_is_ahead_is_extended_and_one_that_is_behind_is_cut():
    steps = {machine: carry_out(speed_at)[0][-1].end for machine, speed_at in MACHINES.items()}
    assert steps["slower from the middle on"] < steps["slow in between"] < steps["steady"]
    # Estimated at the slow speed, the run would have ended long before its time.
    rounds, end = carry_out(MACHINES["faster from the middle on"])
    assert rounds[-1].end > 1.5 * rounds[0].planned_steps
    assert end > 0.8 * BUDGET


def test_a_wrong_first_estimate_does_not_matter():
    steps = [carry_out(MACHINES["steady"], first_estimate=FAST * factor)[0][-1].end for factor in (0.5, 1, 2)]
    assert max(steps) < 1.25 * min(steps)


def test_a_run_whose_time_is_used_up_still_decays():
    rounds = []
    for seconds_left in (400, 300, -50):
        rounds.append(next_round(rounds, seconds_left, FAST))
    assert rounds[-1].is_last
    assert 0 < rounds[-1].end - rounds[-1].start <= planning.MIN_DECAY_SHARE * rounds[-1].start + 1
    assert next_round(rounds, 100, FAST) is None


@pytest.mark.parametrize("machine", MACHINES)
def test_the_schedules_of_the_rounds_are_one_curve_of_learning_rates(machine):
    """Transformers' schedule of every round has the rates of the plan, at every step of that round."""
    rounds, _ = carry_out(MACHINES[machine])
    expected = [rates_at(rounds, step, WARMUP_STEPS) for step in range(rounds[-1].end)]
    assert max(abs(before - after) for before, after in itertools.pairwise(expected)) < 0.05
    for planned in rounds:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler = get_scheduler(
            "warmup_stable_decay", optimizer, WARMUP_STEPS, planned.end, scheduler_specific_kwargs=planned.schedule()
        )
        (rate,) = scheduler.lr_lambdas
        for step in range(planned.start, planned.end):
            assert rate(step) == pytest.approx(expected[step], abs=1e-9), (planned, step)


def test_too_short_a_budget_is_refused_with_the_minimum_that_suffices():
    with pytest.raises(ValueError, match=r"--minutes 0.2 is too short: 100 training steps") as error:
        planning.check_budget(12, FAST)
    minutes = float(str(error.value).split("give --minutes ")[1].split()[0])
    planning.check_budget(60 * minutes, FAST)
    with pytest.raises(ValueError, match="too short"):
        planning.check_budget(60 * minutes, 2 * FAST)
    rounds, end = carry_out(MACHINES["steady"], budget=60 * minutes)
    assert rounds[-1].end >= MIN_STEPS
    assert end <= planning.MAX_OVERTIME * 60 * minutes


def test_fewer_blocks_are_scored_where_the_time_is_short():
    assert planning.blocks_to_score(100, 0.1, 240) == 240
    assert planning.blocks_to_score(10, 0.1, 240) == 100
    assert planning.blocks_to_score(-5, 0.1, 240) == 36
