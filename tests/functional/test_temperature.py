import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calm.functional import batch_temperature_sample
from calm.functional.lazy_samples import LazySamples
from calm.functional.temperature import exact_rounds, sample_batch

PROBABILITY = torch.tensor([0.45, 0.3, 0.15, 0.1], dtype=torch.float64)
# Chunks of two tokens: 0 and 1 differ in the second token alone, 2 and 3 in the first.
CHUNKS = torch.tensor([[5, 0], [5, 1], [6, 0], [7, 1]])


def sample_exact(samples, temperature, **options):
    """Return the patches after the last round."""
    *_, last = exact_rounds(samples, temperature, **options)
    return last


def sharpened(temperature):
    weight = PROBABILITY ** (1 / temperature)
    return weight / weight.sum()


def values(chunks):
    """Which of CHUNKS they are."""
    found = (chunks[:, None] == CHUNKS).all(-1)
    assert found.any(1).all()
    return found.long().argmax(1)


def categorical(num_rows, generator):
    """Draws from PROBABILITY that record what they decode."""

    def draw(rows, count, generator):
        flat = torch.multinomial(PROBABILITY, len(rows) * count, replacement=True, generator=generator)
        return CHUNKS[flat].view(len(rows), count, 2)

    return LazySamples(draw, lambda states, start, stop: states[:, start:stop], num_rows, 2, generator)


def chi_square(chosen, expected):
    counts = torch.bincount(chosen, minlength=len(expected)).double()
    return ((counts - len(chosen) * expected).square() / (len(chosen) * expected)).sum().item()


# 3 degrees of freedom: a right sampler exceeds 16.3 once in a thousand seeds; the seeds are fixed.
CRITICAL = 16.3


@pytest.mark.parametrize("temperature", [1.0, 0.9, 0.7, 0.5, 0.4, 1 / 3, 0.3])
def test_exact_sampler_follows_the_sharpened_law(temperature):
    chunks, accepted = sample_exact(categorical(15000, torch.Generator().manual_seed(4)), temperature)
    assert accepted.all()
    assert chi_square(values(chunks), sharpened(temperature)) < CRITICAL
    if temperature != 1:  # the test can fail: the unsharpened law is told apart
        assert chi_square(values(chunks), PROBABILITY) > 30


def test_exact_sampler_counts_draws_as_the_theory_says():
    # T = 1/2: an attempt costs 2 draws and succeeds with probability sum p^2; rounds have 4, 8, 16, 32 attempts.
    draws = categorical(5000, torch.Generator().manual_seed(5))
    sample_exact(draws, 0.5)
    fail = 1 - PROBABILITY.square().sum().item()
    expected = 8 + 16 * fail**4 + 32 * fail**12 + 64 * fail**28
    error = draws.num_samples.double().std().item() / math.sqrt(5000)
    assert abs(draws.num_samples.double().mean().item() - expected) < 4 * error


def test_exact_sampler_stops_at_its_budget():
    def never_agree(rows, count, _):
        never_agree.last += count
        return torch.arange(never_agree.last, never_agree.last + count).expand(len(rows), -1)[..., None]

    never_agree.last = 0
    draws = LazySamples(never_agree, lambda states, start, stop: states[:, start:stop], 3, 1)
    _, accepted = sample_exact(draws, 0.5, max_samples=100)
    assert not accepted.any()
    assert draws.num_samples.tolist() == [56, 56, 56]  # 8 + 16 + 32; another 64 would be too many


def batch_law(temperature, num_candidates):
    """The batch sampler's law by enumeration of all counts of the chunks among N draws."""
    counts = torch.tensor(
        [c for c in itertools.product(range(num_candidates + 1), repeat=4) if sum(c) == num_candidates]
    ).double()
    log_probability = math.lgamma(num_candidates + 1) - torch.lgamma(counts + 1).sum(1)
    log_probability = log_probability + (counts * PROBABILITY.log()).sum(1)
    exponent = 1 / temperature
    while True:
        reached = (counts >= exponent - 1e-9).any(1)
        weight = torch.where(
            counts >= exponent - 1e-9,
            (torch.lgamma(counts + 1) - torch.lgamma((counts - exponent + 1).clamp(min=1e-9))).exp(),
            0.0,
        )
        assert reached.all()  # with four chunks and so many draws, some are alike
        return (log_probability.exp()[:, None] * weight / weight.sum(1, keepdim=True)).sum(0)


@pytest.mark.parametrize("num_candidates", [10, 20])
@pytest.mark.parametrize("temperature", [0.8, 0.7, 0.5, 0.4, 1 / 3])
def test_the_urn_gives_the_law_of_counting_everything(temperature, num_candidates):
    """Many contexts are settled with 4 draws; the law is that of all N, by enumeration."""
    expected = batch_law(temperature, num_candidates)
    rows = 40000
    draws = categorical(rows, torch.Generator().manual_seed(11))
    lazy = values(sample_batch(draws, temperature, num_candidates))
    candidates = CHUNKS[torch.multinomial(PROBABILITY, rows * num_candidates, True)].view(rows, num_candidates, 2)
    eager = values(batch_temperature_sample(candidates, temperature, torch.Generator().manual_seed(12)))
    assert chi_square(lazy, expected) < CRITICAL
    assert chi_square(eager, expected) < CRITICAL
    if num_candidates == 10:  # the test can fail: the bias of so few candidates is seen
        assert chi_square(lazy, sharpened(temperature)) > 50
    if temperature >= 0.5:
        assert draws.num_samples.double().mean() < 0.9 * num_candidates


@pytest.mark.parametrize("temperature", [0.7, 0.5, 0.15])
def test_the_urn_is_opened_step_by_step(temperature):
    draws = categorical(2000, torch.Generator().manual_seed(13))
    chosen = values(sample_batch(draws, temperature, 200))
    frequency = torch.bincount(chosen, minlength=4).double() / 2000
    torch.testing.assert_close(frequency, sharpened(temperature), atol=0.05, rtol=0)
    assert set(draws.num_samples.tolist()) >= ({16, 64, 200} if temperature == 0.15 else {4, 16})
    assert (draws.num_decoded <= 2 * draws.num_samples).all()
    assert draws.num_decoded.sum() < 2 * draws.num_samples.sum()


def test_rows_with_their_own_generators_do_not_depend_on_their_neighbours():
    """Of each other's number, order and difficulty, at every kind of temperature."""
    sharp = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64)

    def sample(seeds, temperature, sampler):
        def draw(rows, count, generators):
            tables = [sharp if seeds[row] % 2 else PROBABILITY for row in rows.tolist()]
            drawn = [
                torch.multinomial(table, count, True, generator=generator)
                for table, generator in zip(tables, generators, strict=True)
            ]
            return CHUNKS[torch.stack(drawn)]

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = LazySamples(draw, lambda states, start, stop: states[:, start:stop], len(seeds), 2, generators)
        if sampler == "exact":
            return sample_exact(draws, temperature)[0].tolist()
        return sample_batch(draws, temperature, 60).tolist()

    for sampler in ("batch", "exact"):
        for temperature in (0.8, 0.5, 0.3):
            together = sample(range(20), temperature, sampler)
            for seed in (0, 1, 7):
                assert sample([seed], temperature, sampler)[0] == together[seed]
            assert sample([3, 19, 2], temperature, sampler) == [together[3], together[19], together[2]]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1 / 3])
def test_batch_sampler_approaches_the_sharpened_law(temperature):
    generator = torch.Generator().manual_seed(6)
    candidates = CHUNKS[torch.multinomial(PROBABILITY, 20000 * 200, True, generator=generator)].view(20000, 200, 2)
    chosen = torch.cat([batch_temperature_sample(some, temperature, generator) for some in candidates.split(1000)])
    frequency = torch.bincount(values(chosen), minlength=4).double() / len(chosen)
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


class Work(TorchDispatchMode):
    """Counts the operations and the numbers they return."""

    def __init__(self):
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        self.numbers += sum(
            each.numel() for each in (out if isinstance(out, tuple) else [out]) if torch.is_tensor(each)
        )
        return out


@pytest.mark.parametrize("kind", ["all_different", "pairs", "all_sizes"])
def test_the_work_of_the_batch_sampler_grows_with_the_candidates_and_not_with_their_square(kind):
    """At T = 1/N every exponent from N down to the largest count would have to be tried."""

    def work(num_candidates):
        pool = torch.arange(num_candidates)
        if kind == "pairs":
            pool = pool // 2
        if kind == "all_sizes":  # 1 x A, 2 x B, 3 x C, ...: each is a bound that may have to be looked at
            pool = ((8 * pool.double() + 1).sqrt() / 2 + 0.5).long()
        # A chunk begins with the token of its group and ends with a token of its own: nothing agrees in the end.
        pool = torch.stack([pool, torch.arange(num_candidates)], dim=1)[None]
        with Work() as counted:
            batch_temperature_sample(pool, 1 / num_candidates, torch.Generator().manual_seed(1))
        return counted

    small, large = work(50), work(800)
    growth = 16 if kind != "all_sizes" else 16 * 4  # as many bounds as there are sizes, the root of N
    assert large.numbers < 1.5 * growth * small.numbers
    assert large.operations < 1.5 * growth / 16 * small.operations


@pytest.mark.parametrize("temperature", [1 / 6, 0.3])
def test_lowering_the_exponent_at_once_takes_the_random_numbers_of_lowering_it_by_one(temperature):
    """A seed gives the text it gave when every exponent was tried."""
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        pool = torch.multinomial(torch.full((40,), 1 / 40), 12, True, generator=generator)
        generator.manual_seed(seed)
        chosen = batch_temperature_sample(pool[None, :, None], temperature, generator)[0, 0]
        generator.manual_seed(seed)
        exponent, copies = 1 / temperature, (pool[:, None] == pool).sum(1).double()
        while exponent > 1 and copies.max() < exponent:
            torch.rand(1, generator=generator, dtype=torch.float64)
            exponent -= 1
        weight = torch.ones(12).double()
        if exponent > 1:
            weight = torch.lgamma(copies + 1) - torch.lgamma((copies - exponent + 1).clamp(min=1e-9)) - copies.log()
            weight = torch.where(copies >= exponent, weight.exp(), 0)
        place = torch.rand(1, generator=generator, dtype=torch.float64) * weight.sum()
        assert chosen == pool[torch.searchsorted(weight.cumsum(0), place, right=True)[0]]


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1.01, float("nan")])
def test_temperature_outside_the_range_is_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature must be in \(0, 1\], got"):
        batch_temperature_sample(torch.zeros(1, 5, 2, dtype=torch.long), temperature)


def test_too_few_candidates_are_refused():
    with pytest.raises(ValueError, match=r"num_candidates must be at least 4 at temperature 0.25.*got 3"):
        batch_temperature_sample(torch.zeros(1, 3, 2, dtype=torch.long), 0.25)
