"""The closed forms of flows over token codes."""

import itertools
import math

import pytest
import torch

from calm.functional.categorical_flow import code_logit_scale, euler_step, smallest_distance, token_codes


def test_codes_are_fixed_by_their_seed_and_lie_on_a_sphere():
    codes = token_codes(100, 16)
    assert torch.equal(codes, token_codes(100, 16))
    assert not torch.allclose(codes, token_codes(100, 16, seed=1))
    torch.testing.assert_close(codes.norm(dim=-1), torch.full((100,), 4.0))


def test_the_smallest_distance_is_that_of_all_pairs():
    codes = token_codes(50, 3).double()
    assert smallest_distance(codes) == pytest.approx(torch.pdist(codes).min().item(), rel=1e-6)


@pytest.mark.parametrize("time", [0.0, 0.3, 0.6])
def test_scaled_products_give_the_posterior_of_bayes_rule(time):
    """Prior times the density of the noisy code, against the softmax of logits plus a(t) <z, c>."""
    torch.manual_seed(0)
    codes, prior = token_codes(7, 5).double(), torch.randn(7, dtype=torch.double).softmax(-1)
    point = time * codes[2] + (1 - time) * torch.randn(5, dtype=torch.double)
    density = torch.distributions.Normal(time * codes, 1 - time).log_prob(point).sum(-1)
    expected = (prior.log() + density).softmax(-1)
    scale = code_logit_scale(torch.tensor(time, dtype=torch.double))
    torch.testing.assert_close((prior.log() + scale * codes @ point).softmax(-1), expected)


def test_euler_steps_towards_a_known_code_follow_its_straight_path():
    """Where the clean token is certain the velocity is constant, so that any number of steps is exact."""
    torch.manual_seed(0)
    noise, code = torch.randn(2, 5)
    point = noise
    times = [0.0, 0.2, 0.5, 0.9, 1.0]
    for time, next_time in itertools.pairwise(times):
        point = euler_step(point, code, torch.tensor(time), torch.tensor(next_time))
        torch.testing.assert_close(point, (1 - next_time) * noise + next_time * code)


def test_a_noisy_code_is_readable_near_the_largest_time_of_training():
    """The premise of max_time: at t = 0.6 and 16 dimensions the code alone names its token nearly always."""
    generator = torch.Generator().manual_seed(0)
    codes = token_codes(1024, 16)
    points = 0.6 * codes + 0.4 * torch.randn(codes.shape, generator=generator)
    assert ((points @ codes.T).argmax(-1) == torch.arange(1024)).float().mean() > 0.9
    assert math.isinf(code_logit_scale(torch.tensor(1.0)))
