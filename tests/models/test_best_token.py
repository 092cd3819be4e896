import pytest
import torch

from calm.models.best_token import best_token


@pytest.mark.parametrize("vocab_size", [7, 255, 256, 300, 1024, 1025])
@pytest.mark.parametrize("rows", [1, 300])
def test_tiles_and_blocks_find_the_arg_max(vocab_size, rows):
    states, weight = torch.randn(rows, 16), torch.randn(vocab_size, 16)
    best = best_token(states, weight)
    assert torch.equal(best, (states @ weight.T).argmax(-1))
    weight[-1] = 100 * states[0]  # the last token, in a block of its own
    assert best_token(states, weight)[0] == vocab_size - 1


def test_the_first_of_equals_wins():
    weight = torch.zeros(600, 4)
    weight[[130, 131, 500]] = 1
    assert best_token(torch.ones(3, 4), weight).tolist() == [130, 130, 130]
