"""Likelihoods of texts: those of what token prediction draws."""

from itertools import product

import pytest
import tiny
import torch

from calm import CalmConfig, CalmForCausalLM
from calm.evaluation.likelihood import log_likelihoods


@pytest.mark.parametrize("kind", ["independent", "autoregressive", "direct"])
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_probabilities_of_all_continuations_add_up_to_one(patch_size, kind):
    if kind == "direct":
        model, sampler = tiny.calm(patch_size, "categorical_flow", vocab_size=4), "direct"
    else:
        model, sampler = tiny.calm(patch_size, vocab_size=4, token_prediction=kind), "mtp"
    every = list(product(range(4), repeat=4))  # not whole patches of three
    found = log_likelihoods(model, [[1, 2, 3, 0, 1]] * len(every), every, sampler)
    probability = torch.tensor([value for value, _ in found]).exp()
    assert probability.sum().item() == pytest.approx(1, rel=1e-4)
    # The likeliest in every place: what the lowest temperature writes.
    greedy = model.generate(
        torch.tensor([[1, 2, 3, 0, 1]]), max_new_tokens=4, temperature=0, sampler=sampler,
        eos_token_id=[],
    )[0, 5:]  # fmt: skip
    assert [text for text, (_, likeliest) in zip(every, found, strict=True) if likeliest] == [tuple(greedy.tolist())]


@torch.no_grad()
def test_they_are_those_of_the_draws():
    model = tiny.calm(2, vocab_size=4, token_prediction="autoregressive")
    every, context, count = list(product(range(4), repeat=3)), [3, 1, 2], 20000
    law = torch.tensor([value for value, _ in log_likelihoods(model, [context] * 64, every)]).exp()
    drawn = model.generate(
        torch.tensor([context] * count), max_new_tokens=3, sampler="mtp", eos_token_id=[],
        generator=torch.Generator().manual_seed(0),
    )[:, 3:]  # fmt: skip
    found = torch.bincount(drawn @ torch.tensor([16, 4, 1]), minlength=64) / count
    assert ((found - law).abs() <= 4.5 * (law * (1 - law) / count).sqrt() + 2 / count).all()


def test_a_text_is_as_likely_beside_others_as_alone():
    model = tiny.calm(3, token_prediction="autoregressive")
    contexts = [tiny.tokens(1, length)[0].tolist() for length in (5, 0, 13, 6)]
    continuations = [tiny.tokens(1, length)[0].tolist() for length in (7, 2, 1, 12)]
    together = log_likelihoods(model, contexts, continuations)
    for each, context, continuation in zip(together, contexts, continuations, strict=True):
        ((alone, likeliest),) = log_likelihoods(model, [context], [continuation])
        assert each == (pytest.approx(alone, rel=1e-4), likeliest)


def test_padding_behind_short_texts_takes_no_positions():
    """Each fits the context alone, so all fit together: a backbone of 8 learnt positions knows no ninth."""
    config = CalmConfig(
        autoencoder_config=tiny.autoencoder_config(1),
        backbone_config={
            "model_type": "gpt2", "vocab_size": tiny.VOCAB_SIZE, "n_embd": 16, "n_layer": 1, "n_head": 2,
            "n_positions": 8,
        },
        head_config={"type": "energy"} | tiny.HEAD_FIELDS["energy"],
        mtp_weight=1.0,
    )  # fmt: skip
    model = CalmForCausalLM(config).eval()
    contexts, continuations = [[2, 3, 4, 5, 6, 7], [2]], [[8, 9], [3, 4, 5, 6, 7, 8, 9]]
    together = log_likelihoods(model, contexts, continuations)
    alone = [log_likelihoods(model, [a], [b])[0] for a, b in zip(contexts, continuations, strict=True)]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=1e-4)
