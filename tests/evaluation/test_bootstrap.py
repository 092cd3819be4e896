"""Standard errors over blocks, against many texts drawn anew."""

import pytest
import torch

from calm.evaluation.bootstrap import brier_difference, resampled_means
from calm.functional.brier import brier_lm


def two_models(generator, num_blocks=60):
    """Brier scores of two models (times 100) on blocks that are hard or easy for both, ``[blocks, 4]`` each."""
    ease = torch.rand((num_blocks, 1), generator=generator, dtype=torch.float64)
    levels = torch.tensor([20.0, 10.0, 6.0, 4.0], dtype=torch.float64)
    first = levels * (0.5 + ease)
    own = 1 + 0.1 * torch.randn((num_blocks, 1), generator=generator, dtype=torch.float64)
    return 1.1 * first * own, first


def test_errors_are_those_of_other_texts_and_far_smaller_of_a_difference():
    generator = torch.Generator().manual_seed(0)
    differences, errors, scores, own_errors = [], [], [], []
    for _ in range(300):
        better, first = two_models(generator)
        difference, error = brier_difference(better.tolist(), first.tolist())
        assert difference == pytest.approx(brier_lm((better / 100).mean(0)) - brier_lm((first / 100).mean(0)))
        differences.append(difference)
        errors.append(error)
        scores.append(brier_lm((first / 100).mean(0)))
        own_errors.append(brier_lm(resampled_means(first / 100)).std())
    differences, errors, scores, own_errors = map(torch.tensor, (differences, errors, scores, own_errors))
    assert errors.mean() == pytest.approx(differences.std().item(), rel=0.15)
    assert own_errors.mean() == pytest.approx(scores.std().item(), rel=0.15)
    assert errors.mean() < own_errors.mean() / 2


def test_a_model_does_not_differ_from_itself_and_few_blocks_have_no_error():
    blocks = two_models(torch.Generator().manual_seed(0))[0].tolist()
    assert brier_difference(blocks, blocks) == (0, 0)
    assert brier_difference(blocks[:7], blocks[:7]) == (0, None)
    # BrierLM is 0 for both where a Brier score is not above 0, which does not make them equal.
    lost = [[*block[:3], -1.0] for block in blocks]
    assert brier_difference(lost, [[2 * block[0], *block[1:]] for block in lost]) == (0, None)
    with pytest.raises(ValueError, match="brier_difference compares the same blocks, got 7 and 8 of them"):
        brier_difference(blocks[:7], blocks[:8])
