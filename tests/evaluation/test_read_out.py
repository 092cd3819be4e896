"""Read-outs of token prediction against the law they stand for, listed in full."""

from itertools import product

import pytest
import tiny
import torch

from calm import CalmConfig, CalmForCausalLM
from calm.evaluation import read_out
from calm.evaluation.read_out import read_out_brier


class Blocks:
    block_size = 16

    def __init__(self, ids):
        self.ids = ids

    def batches(self, num_blocks, batch_size):
        yield from self.ids[:num_blocks].split(batch_size)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2, 8])
def test_the_scores_are_those_of_independent_tokens(patch_size, monkeypatch):
    vocab_size = 4
    plain = tiny.calm(patch_size, vocab_size=vocab_size)
    model = CalmForCausalLM(CalmConfig(**{**plain.config.to_dict(), "token_prediction_weight": 1.0})).eval()
    torch.nn.init.normal_(model.token_predictor.proj.weight)
    ids = torch.randint(vocab_size, (3, Blocks.block_size))
    monkeypatch.setattr(read_out, "_TILE_ELEMENTS", 20)  # several tiles
    found = read_out_brier(model, Blocks(ids), stride=8, batch_size=2)

    length = min(patch_size, 4)
    expected = torch.zeros(length, dtype=torch.double)
    for text in ids:  # one position of each block: the patch behind the first 8 tokens
        hidden = model(text[None, :8]).last_hidden_state[0, -1]
        states = model.token_predictor.proj(hidden).view(patch_size, -1)
        law = (states @ model.get_input_embeddings().weight.T).double().softmax(-1)
        for n in range(1, length + 1):
            for gram in product(range(vocab_size), repeat=n):
                probability = torch.stack([law[place, token] for place, token in enumerate(gram)]).prod()
                is_text = list(gram) == text[8 : 8 + n].tolist()
                expected[n - 1] += 1 / len(ids) * (2 * probability * is_text - probability**2)
    assert found == pytest.approx((100 * expected).tolist(), rel=1e-4, abs=1e-4)
