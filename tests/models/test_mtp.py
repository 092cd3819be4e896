"""The MTP head: its loss and its samples against its distribution, written out."""

import json
from itertools import product

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import embedding, layer_norm, silu
from transformers import AutoModelForCausalLM

from calm import CalmConfig, CalmForCausalLM
from calm.checkpoints.loading import load_model
from calm.generation.sampling_params import SamplingParams
from calm.models import mtp as mtp_module

KINDS = ("independent", "autoregressive")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mtp(temperature=1.0):
    return SamplingParams(temperature, "mtp").with_defaults()


def log_law(model, hidden, before):
    """Log-probabilities ``[P, V]`` of the token behind those of its patch ``[P, n]``, for states ``[P, D]``."""
    predictor, embeddings = model.mtp_head, model.get_input_embeddings().weight
    width, position = hidden.shape[1], before.shape[1]
    state = hidden @ predictor.proj.weight[position * width : (position + 1) * width].T
    if model.config.mtp_type == "autoregressive" and position:
        first, _, last = predictor.mixers[position - 1]
        known = torch.cat([hidden[:, None], embedding(before, embeddings)], dim=1)
        known = layer_norm(known, (width,), predictor.norm.weight, predictor.norm.bias)
        state = state + last(silu(first(known.flatten(1))))
    return (state @ embeddings.T).log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch_size", [1, 3])
def test_the_loss_is_the_cross_entropy_of_the_next_patch(patch_size, kind):
    taught, ids = tiny.calm(patch_size, token_prediction=kind), tiny.tokens(2, 4 * patch_size)
    fields = taught.config.to_dict() | {"mtp_weight": 0.0}
    plain = CalmForCausalLM(CalmConfig(**fields)).eval()
    plain.load_state_dict(
        {name: tensor for name, tensor in taught.state_dict().items() if not name.startswith("mtp_head.")}
    )
    taught.config.mtp_weight = 0.5
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
    for parameter in again.mtp_head.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(again.generate(ids, max_new_tokens=8, sampler="batch", generator=seeded()), from_head)
    assert not torch.equal(again.generate(ids, generator=seeded(), **settings), first)


def as_an_earlier_release_saved_it(model, path):
    """The files of a model, with the former names of its fields and weights."""
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    for name in ("weight", "type"):
        config[f"token_prediction_{name}"] = config.pop(f"mtp_{name}")
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(path / "model.safetensors")
    former = {name.replace("mtp_head.", "token_predictor."): value for name, value in weights.items()}
    assert former.keys() != weights.keys()
    save_file(former, path / "model.safetensors", {"format": "pt"})
    return former


def test_models_of_earlier_releases_load_without_a_warning_and_are_saved_under_the_present_names(tmp_path):
    model = tiny.calm(2, token_prediction="autoregressive")
    former = as_an_earlier_release_saved_it(model, tmp_path / "former")
    for load in (CalmForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained, load_model):
        loaded = load(tmp_path / "former")
        assert (loaded.config.mtp_weight, loaded.config.mtp_type) == (1.0, "autoregressive")
        assert loaded.token_predictor is loaded.mtp_head  # scripts that read the former names
        assert loaded.config.token_prediction_weight == 1.0
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    loaded.save_pretrained(tmp_path / "again")
    assert "mtp_head.proj.weight" in load_file(tmp_path / "again" / "model.safetensors")
    assert "mtp_weight" in json.loads((tmp_path / "again" / "config.json").read_text())
    # As the Trainer resumes.
    fresh = tiny.calm(2, token_prediction="autoregressive")
    torch.nn.init.zeros_(fresh.mtp_head.proj.weight)
    assert fresh.load_state_dict(former, strict=True).missing_keys == []
    assert torch.equal(fresh.mtp_head.proj.weight, model.mtp_head.proj.weight)


def test_former_names_in_python_warn():
    fields = {"autoencoder_config": tiny.autoencoder_config(), "backbone_config": tiny.backbone()}
    with pytest.warns(FutureWarning, match="CalmConfig: token_prediction_weight is now called mtp_weight"):
        config = CalmConfig(**fields, token_prediction_weight=2.0)
    assert config.mtp_weight == 2.0
    assert "token_prediction_weight" not in config.to_dict()


def test_every_weight_learns():
    """Where one has no gradient, distributed training stops."""
    for patch_size in (1, 2):
        model = tiny.calm(patch_size, token_prediction="autoregressive").train()
        ids = tiny.tokens(2, 4 * patch_size)
        model(ids, labels=ids).loss.backward()
        unused = [name for name, p in model.mtp_head.named_parameters() if p.grad is None or not p.grad.any()]
        assert unused == []


def test_another_kind_is_refused():
    with pytest.raises(Exception, match=r"mtp_type'[\s\S]*expected one of"):
        CalmConfig(mtp_type="bigram")
