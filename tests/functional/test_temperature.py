import math

import pytest
import torch

from calm.functional import batch_temperature_sample, exact_temperature_sample

PROBABILITY = torch.tensor([0.45, 0.3, 0.15, 0.1], dtype=torch.float64)


def sharpened(temperature):
    weight = PROBABILITY ** (1 / temperature)
    return weight / weight.sum()


def draws(shape, generator):
    """Chunks of two tokens (v, v + 10), v from PROBABILITY."""
    flat = torch.multinomial(PROBABILITY, math.prod(shape), replacement=True, generator=generator)
    return torch.stack([flat, flat + 10], dim=-1).view(*shape, 2)


def chi_square(chosen, expected):
    counts = torch.bincount(chosen, minlength=len(expected)).double()
    return ((counts - len(chosen) * expected).square() / (len(chosen) * expected)).sum().item()


# 3 degrees of freedom: a right sampler exceeds 16.3 once in a thousand seeds; the seed is fixed.
CRITICAL = 16.3


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.5, 0.4, 1 / 3])
def test_exact_sampler_follows_the_sharpened_law(temperature):
    generator = torch.Generator().manual_seed(3)
    chunks, accepted, _ = exact_temperature_sample(
        lambda rows, count: draws((len(rows), count), generator), 15000, temperature, generator, draws_per_round=16
    )
    assert accepted.all()
    assert torch.equal(chunks[:, 1], chunks[:, 0] + 10)
    assert chi_square(chunks[:, 0], sharpened(temperature)) < CRITICAL
    if temperature != 1:  # the test can fail: the unsharpened law is told apart
        assert chi_square(chunks[:, 0], PROBABILITY) > 100


def test_exact_sampler_gives_the_law_whatever_the_rounds():
    for draws_per_round in (1, 3):
        generator = torch.Generator().manual_seed(4)
        chunks, _, _ = exact_temperature_sample(
            lambda rows, count, g=generator: draws((len(rows), count), g), 5000, 0.4, generator, draws_per_round
        )
        assert chi_square(chunks[:, 0], sharpened(0.4)) < CRITICAL


def test_exact_sampler_counts_draws_as_the_theory_says():
    # T = 1/2: pairs until one agrees; a pair that disagrees costs 2 draws, so the mean is 2 / sum p^2.
    generator = torch.Generator().manual_seed(5)
    _, _, num_draws = exact_temperature_sample(
        lambda rows, count: draws((len(rows), count), generator), 5000, 0.5, generator
    )
    expected = 2 / PROBABILITY.square().sum().item()
    assert abs(num_draws.double().mean().item() - expected) < 4 * num_draws.double().std().item() / math.sqrt(5000)


def test_exact_sampler_stops_at_its_budget():
    def never_agree(rows, count):
        never_agree.last += count
        return torch.arange(never_agree.last, never_agree.last + count).expand(len(rows), -1)[..., None]

    never_agree.last = 0
    _, accepted, num_draws = exact_temperature_sample(never_agree, 3, 0.5, max_draws=100, draws_per_round=64)
    assert not accepted.any()
    assert num_draws.tolist() == [100, 100, 100]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1 / 3])
def test_batch_sampler_approaches_the_sharpened_law(temperature):
    generator = torch.Generator().manual_seed(6)
    chosen = torch.cat(
        [batch_temperature_sample(draws((1000, 200), generator), temperature, generator) for _ in range(20)]
    )
    frequency = torch.bincount(chosen[:, 0], minlength=4).double() / len(chosen)
    torch.testing.assert_close(frequency, sharpened(temperature), atol=0.015, rtol=0)


def test_batch_sampler_weighs_by_the_number_of_agreeing_subsets():
    # 4 x A, 2 x B, 1 x C at T = 1/2: C(4, 2) = 6 against C(2, 2) = 1 against 0.
    pool = torch.tensor([0, 1, 0, 2, 0, 1, 0])[None, :, None].expand(5000, -1, -1)
    chosen = batch_temperature_sample(pool, 0.5, torch.Generator().manual_seed(7))[:, 0]
    frequency = torch.bincount(chosen, minlength=3).double() / len(chosen)
    torch.testing.assert_close(frequency, torch.tensor([6 / 7, 1 / 7, 0.0], dtype=torch.float64), atol=0.01, rtol=0)


def test_batch_sampler_falls_back_row_by_row():
    # At T = 1/3 the first row has a chunk seen 3 times, the second only pairs, the third no agreement at all.
    pool = torch.tensor([[5, 5, 5, 6, 6], [7, 7, 8, 9, 9], [1, 2, 3, 4, 0]])[..., None].repeat(2000, 1, 1)
    chosen = batch_temperature_sample(pool, 1 / 3, torch.Generator().manual_seed(8))[:, 0].view(-1, 3)
    assert set(chosen[:, 0].tolist()) == {5}
    assert set(chosen[:, 1].tolist()) == {7, 9}
    assert set(chosen[:, 2].tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1.01, float("nan")])
def test_temperature_outside_the_range_is_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature must lie in \(0, 1\], got"):
        batch_temperature_sample(torch.zeros(1, 5, 2, dtype=torch.long), temperature)


def test_too_few_candidates_are_refused():
    with pytest.raises(ValueError, match=r"at least 4 candidates.*num_candidates=3"):
        batch_temperature_sample(torch.zeros(1, 3, 2, dtype=torch.long), 0.25)
