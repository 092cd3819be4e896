"""Token codes: fixed vectors on a sphere."""

import pytest
import torch

from calm.functional.token_codes import smallest_distance, token_codes


def test_codes_are_fixed_by_their_seed_and_lie_on_a_sphere():
    codes = token_codes(100, 16)
    assert torch.equal(codes, token_codes(100, 16))
    assert not torch.allclose(codes, token_codes(100, 16, seed=1))
    torch.testing.assert_close(codes.norm(dim=-1), torch.full((100,), 4.0))


def test_the_smallest_distance_is_that_of_all_pairs_or_of_some_rows():
    codes = token_codes(50, 3).double()
    assert smallest_distance(codes) == pytest.approx(torch.pdist(codes).min().item(), rel=1e-6)
    distances = torch.cdist(codes[[3, 7]], codes)
    expected = distances[distances > 1e-6].min().item()
    assert smallest_distance(codes, torch.tensor([3, 7])) == pytest.approx(expected, rel=1e-6)
