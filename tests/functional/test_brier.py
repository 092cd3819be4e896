from itertools import product

import golden
import pytest
import torch

from calm.functional import brier_estimate, brier_lm


def test_estimate_is_unbiased_by_enumeration():
    # All pairs of draws from a distribution over 2-grams of 3 tokens, weighted by their probability.
    probability = torch.rand(3, 3, dtype=torch.float64)
    probability /= probability.sum()
    target = torch.tensor([1, 2])
    expected = torch.zeros(2, dtype=torch.float64)
    for first in product(range(3), repeat=2):
        for second in product(range(3), repeat=2):
            weight = probability[first] * probability[second]
            expected += weight * brier_estimate(torch.tensor(first), torch.tensor(second), target)
    marginal = probability.sum(1)
    closed_form = torch.stack(
        [2 * marginal[1] - marginal.square().sum(), 2 * probability[1, 2] - probability.square().sum()]
    )
    torch.testing.assert_close(expected, closed_form)


def test_matches_the_reference():
    recorded = golden.load("brier/synthetic_k4")
    estimate = brier_estimate(recorded["predictions_1"], recorded["predictions_2"], recorded["targets"]).mean((0, 1))
    golden.close(estimate, recorded["brier"])
    golden.close(brier_lm(estimate), 100 * recorded["brierlm"].float())


def test_prefixes_are_cumulative():
    estimate = brier_estimate(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3]), torch.tensor([1, 2, 3]))
    assert estimate.tolist() == [1.0, 1.0, 1.0]
    # The second draw agrees again on its third token, but its prefix does not.
    assert brier_estimate(torch.tensor([1, 9, 3]), torch.tensor([1, 5, 3]), torch.tensor([1, 2, 3])).tolist() == [
        1,
        0,
        0,
    ]


def test_brier_lm_is_a_geometric_mean():
    torch.testing.assert_close(
        brier_lm(torch.tensor([0.4, 0.2, 0.1, 0.05])), torch.tensor(100 * (0.4 * 0.2 * 0.1 * 0.05) ** 0.25)
    )


def test_two_negative_scores_do_not_make_a_positive_one():
    assert brier_lm(torch.tensor([0.5, 0.2, -0.1, -0.1])) == 0


def test_greedy_draws_score_twice_their_accuracy_minus_one():
    """One text decoded twice always agrees with itself: above 0 where it is right in more than half of the places."""
    target = torch.randint(5, (400, 4))
    for share, wrong in ((0.9, 1), (0.3, 2)):
        greedy = torch.where(torch.rand(400, 4) < share, target, target + wrong)
        score = brier_estimate(greedy, greedy, target).mean(0)
        accuracy = torch.stack([(greedy[:, :n] == target[:, :n]).all(1).float().mean() for n in range(1, 5)])
        torch.testing.assert_close(score, 2 * accuracy - 1)
        assert (score[0] > 0) == (share > 0.5)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(3, 4\), \(3, 4\) and \(3, 5\)"):
        brier_estimate(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 5))
