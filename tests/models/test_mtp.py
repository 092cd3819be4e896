"""Token prediction: its loss and its draws against the law it stands for, written out."""

from itertools import product

import pytest
import tiny
import torch
from torch.nn.functional import embedding, layer_norm, silu

from calm import CalmConfig, CalmForCausalLM
from calm.generation.sampling_params import SamplingParams
from calm.models import mtp as mtp_module

KINDS = ("independent", "autoregressive")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mtp(temperature=1.0):
    return SamplingParams(temperature, "mtp").with_defaults()


def log_law(model, hidden, before):
    """Log-probabilities ``[P, V]`` of the token behind those of its patch ``[P, n]``, for states ``[P, D]``."""
    predictor, embeddings = model.token_predictor, model.get_input_embeddings().weight
    width, position = hidden.shape[1], before.shape[1]
    state = hidden @ predictor.proj.weight[position * width : (position + 1) * width].T
    if model.config.token_prediction_type == "autoregressive" and position:
        first, _, last = predictor.mixers[position - 1]
        known = torch.cat([hidden[:, None], embedding(before, embeddings)], dim=1)
        known = layer_norm(known, (width,), predictor.norm.weight, predictor.norm.bias)
        state = state + last(silu(first(known.flatten(1))))
    return (state @ embeddings.T).log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch_size", [1, 3])
def test_the_loss_is_the_cross_entropy_of_the_next_patch(patch_size, kind):
    taught, ids = tiny.calm(patch_size, token_prediction=kind), tiny.tokens(2, 4 * patch_size)
    fields = taught.config.to_dict() | {"token_prediction_weight": 0.0}
    plain = CalmForCausalLM(CalmConfig(**fields)).eval()
    plain.load_state_dict({name: tensor for name, tensor in taught.state_dict().items() if "predictor" not in name})
    taught.config.token_prediction_weight = 0.5
    labels = ids.clone()
    labels[0, 2 * patch_size] = -100  # the third patch of the first row counts for neither loss
    noise = {"noise": torch.rand(4, 2, 3, 6), "target_noise": torch.randn(8, 2, 3, 8)}
    out, without = taught(ids, labels=labels, **noise), plain(ids, labels=labels, **noise)

    hidden, patches = out.last_hidden_state[:, :-1].flatten(0, 1), ids[:, patch_size:].reshape(-1, patch_size)
    surprise = [
        -log_law(taught, hidden, patches[:, :place]).gather(-1, patches[:, place, None])
        for place in range(patch_size)
    ]  # fmt: skip
    counts = torch.tensor([True, False, True, True, True, True])
    expected = torch.cat(surprise, dim=-1)[counts].mean()
    assert out.metrics["token_cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx((without.loss + 0.5 * expected).item(), rel=1e-5)
    # Nothing to predict: no loss, and no gradient that is no number.
    nothing = taught(ids, labels=torch.full_like(ids, -100), **noise)
    nothing.loss.backward()
    assert nothing.loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in taught.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])
def test_draws_follow_the_law_of_every_token(temperature, kind, monkeypatch):
    vocab_size, count = 6, 20000
    model = tiny.calm(3, vocab_size=vocab_size, token_prediction=kind)
    hidden = model(torch.randint(vocab_size, (2, 6))).last_hidden_state[:, -1]
    rows = hidden.repeat_interleave(count, 0)
    chunk = model.sample_patch(rows, mtp(temperature), seeded(1))
    assert (chunk.num_samples == 1).all()
    assert (chunk.num_decoded == 3).all()

    triples = torch.tensor(list(product(range(vocab_size), repeat=3)))
    law = torch.ones(2, len(triples), dtype=torch.double)
    for row, place in product(range(2), range(3)):
        each = log_law(model, hidden[row].expand(len(triples), -1), triples[:, :place]) / temperature
        law[row] *= each.double().softmax(-1).gather(-1, triples[:, place, None])[:, 0]
    places = chunk.tokens.view(2, count, 3) @ torch.tensor([36, 6, 1])
    found = torch.stack([torch.bincount(each, minlength=216) for each in places]) / count
    assert ((found - law).abs() <= 4.5 * (law * (1 - law) / count).sqrt() + 2 / count).all()

    monkeypatch.setattr(mtp_module, "_TILE_ELEMENTS", 1000 * vocab_size)
    assert torch.equal(model.sample_patch(rows, mtp(temperature), seeded(1)).tokens, chunk.tokens)
    # Close to temperature 0 it is the likeliest token, whatever the noise.
    coldest = model.sample_patch(hidden, mtp(1e-300)).tokens
    for place in range(3):
        assert torch.equal(coldest[:, place], log_law(model, hidden, coldest[:, :place]).argmax(-1))


@torch.no_grad()
def test_tokens_of_a_patch_depend_on_each_other_where_they_should():
    """The mutual information of two tokens of a patch, given the hidden state: nothing, or something."""
    for kind in KINDS:
        model = tiny.calm(2, vocab_size=6, token_prediction=kind)
        hidden = model(torch.zeros(1, 2, dtype=torch.long)).last_hidden_state[0].expand(20000, -1)
        tokens = model.sample_patch(hidden, mtp(), seeded()).tokens
        joint = torch.bincount(tokens @ torch.tensor([6, 1]), minlength=36).view(6, 6) / len(tokens)
        apart = joint.sum(1, keepdim=True) * joint.sum(0)
        information = torch.special.xlogy(joint, joint / apart).sum()
        assert (information > 0.01) == (kind == "autoregressive"), kind


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_takes_no_part_in_what_the_head_draws(kind, tmp_path):
    model = tiny.calm(2, token_prediction=kind)
    model.save_pretrained(tmp_path)
    again, ids = CalmForCausalLM.from_pretrained(tmp_path), tiny.tokens(1, 4)
    settings = {"max_new_tokens": 8, "sampler": "mtp"}
    first, second = (each.generate(ids, generator=seeded(), **settings) for each in (model, again))
    assert torch.equal(first, second)
    from_head = model.generate(ids, max_new_tokens=8, sampler="batch", generator=seeded())
    for parameter in again.token_predictor.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(again.generate(ids, max_new_tokens=8, sampler="batch", generator=seeded()), from_head)
    assert not torch.equal(again.generate(ids, generator=seeded(), **settings), first)


def test_every_weight_learns():
    """Where one has no gradient, distributed training stops."""
    for patch_size in (1, 2):
        model = tiny.calm(patch_size, token_prediction="autoregressive").train()
        ids = tiny.tokens(2, 4 * patch_size)
        model(ids, labels=ids).loss.backward()
        unused = [name for name, p in model.token_predictor.named_parameters() if p.grad is None or not p.grad.any()]
        assert unused == []


def test_another_kind_is_refused():
    with pytest.raises(Exception, match=r"token_prediction_type'[\s\S]*expected one of"):
        CalmConfig(token_prediction_type="bigram")
