"""The choice of the number of drafted tokens."""

import itertools

import pytest
import torch
from drafting_models import MASK, PROMPTS, make_drafter, make_target

from calm.generation.draft_length import AdaptiveDraftLength
from calm.generation.drafting import generate_with_drafter
from calm.models.drafters import DRAFTERS


def simulate(acceptance: list[float], seconds: list[float], rounds: int = 400) -> list[int]:
    """Return the lengths chosen where position j is accepted with a probability and a round of n takes seconds[n]."""
    generator = torch.Generator().manual_seed(0)
    adaptive, chosen = AdaptiveDraftLength(len(acceptance)), []
    for _ in range(rounds):
        length = adaptive.choose()
        draws = torch.rand(length, generator=generator).tolist()
        accepted = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] < pair[1], zip(draws, acceptance, strict=False))
        )
        adaptive.record(length, seconds[length], [accepted])
        chosen.append(length)
    return chosen


@pytest.mark.parametrize(
    ("acceptance", "seconds", "best"),
    [
        ([0.9, 0.9, 0.9], [1.0, 1.0, 1.0, 1.0], 3),  # a pass over a draft is free
        ([0.6, 0.1, 0.1], [1.0, 1.1, 1.5, 1.6], 1),
        ([0.05, 0.05, 0.05], [1.0, 1.3, 1.4, 1.5], 0),  # drafting does not pay
    ],
)
def test_the_length_with_the_most_tokens_per_second_is_chosen(acceptance, seconds, best):
    chosen = simulate(acceptance, seconds)
    assert chosen[200:].count(best) > 0.9 * len(chosen[200:])
    assert set(chosen) == set(range(len(acceptance) + 1))  # every length was measured


def test_drafting_is_tried_again_when_a_text_becomes_predictable():
    adaptive = AdaptiveDraftLength(2)
    seconds, lengths = [1.0, 1.4, 1.5], []
    for number in range(2000):
        length = adaptive.choose()
        adaptive.record(length, seconds[length], [length if number > 200 else 0])
        lengths.append(length)
    assert lengths[150:200].count(0) >= 48
    assert lengths[-100:] == [2] * 100


@pytest.mark.parametrize("drafter_type", sorted(DRAFTERS))
def test_greedy_text_does_not_depend_on_the_lengths(drafter_type):
    target = make_target()
    drafter = make_drafter(target, drafter_type)
    expected = target.generate(PROMPTS, attention_mask=MASK, max_new_tokens=40, do_sample=False)
    adaptive = AdaptiveDraftLength(4)
    result = generate_with_drafter(target, drafter, PROMPTS, MASK, max_new_tokens=40, num_draft_tokens=adaptive)
    assert torch.equal(result.sequences, expected)
    # The first rounds measure all lengths, so there were rounds with and without drafts.
    assert 0 < result.statistics.num_drafted < 4 * result.statistics.num_verifications


def test_a_draft_longer_than_the_drafters_is_refused():
    target = make_target()
    with pytest.raises(ValueError, match=r"must be in \[1, 4\] for this drafter, got 5"):
        generate_with_drafter(
            target, make_drafter(target, "mtp"), PROMPTS, MASK, num_draft_tokens=AdaptiveDraftLength(5)
        )
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        AdaptiveDraftLength(0)
