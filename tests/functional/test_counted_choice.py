"""The batch sampler without host reads has the distribution of the lazy one."""

import pytest
import torch

from calm.functional.counted_choice import choose_by_counts
from calm.functional.temperature import batch_temperature_sample

ROWS = 20_000
# How often each of the patches is there: agreement, ties, and none that occurs often enough.
POOLS = {"one leads": [5, 3, 1, 1], "ties": [3, 3, 3, 1], "nothing agrees": [1] * 10, "pairs": [2, 2, 2, 2, 1, 1]}


@pytest.mark.parametrize("counts", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.4, 1 / 3, 0.2])
def test_the_distribution_is_that_of_the_lazy_sampler(counts, temperature):
    patches = torch.tensor([[place, place + 1] for place in range(len(counts))])
    pool = patches.repeat_interleave(torch.tensor(counts), dim=0)
    candidates = pool.expand(ROWS, -1, -1)
    chosen = choose_by_counts(candidates, temperature, torch.rand(ROWS, 1))
    expected = batch_temperature_sample(candidates, temperature)
    assert torch.equal(chosen[:, 1], chosen[:, 0] + 1)
    shares, others = (torch.bincount(each[:, 0], minlength=len(counts)) / ROWS for each in (chosen, expected))
    error = ((shares * (1 - shares) + others * (1 - others)) / ROWS).sqrt()
    assert ((shares - others).abs() <= 4.5 * error + 1e-9).all(), (shares, others)


def test_rows_do_not_see_each_other():
    candidates, uniforms = torch.randint(3, (6, 20, 2)), torch.rand(6, 1)
    together = choose_by_counts(candidates, 0.5, uniforms)
    alone = [choose_by_counts(candidates[row, None], 0.5, uniforms[row, None]) for row in range(6)]
    assert torch.equal(together, torch.cat(alone))
