"""The Brier score of decoded draws, against enumeration, against autograd, and in training."""

from itertools import product

import pytest
import tiny
import torch

from calm import CalmConfig, CalmForCausalLM
from calm.functional import energy_score
from calm.models import decoded_brier as module
from calm.models.decoded_brier import decoded_brier

N, P, E, V = 3, 5, 6, 4


def example(patch_size, dtype=torch.float64):
    torch.manual_seed(0)
    states = torch.randn(N, P, patch_size, E, dtype=dtype)
    return states, torch.randn(V, E, dtype=dtype), torch.randint(V, (P, patch_size))


def plainly(states, embeddings, text):
    """Over all pairs of draws, n-gram by n-gram, with autograd."""
    law = (states @ embeddings.T).softmax(-1)
    longest = min(states.shape[2], 4)
    total = 0
    for n in range(1, longest + 1):
        right = torch.stack([law[:, :, k].gather(-1, text[None, :, k, None].expand(N, -1, -1)) for k in range(n)])
        hit = right.prod(0).mean((0, 2))
        agree = torch.stack([torch.einsum("ipv,jpv->ijp", law[:, :, k], law[:, :, k]) for k in range(n)]).prod(0)
        pairs = sum(agree[i, j] for i in range(N) for j in range(N) if i != j)
        total = total + 2 * hit - pairs / (N * (N - 1))
    return total / longest


@pytest.mark.parametrize("patch_size", [1, 3, 4, 6])
def test_score_and_gradient_are_those_of_plain_autograd(monkeypatch, patch_size):
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 2 * min(patch_size, 4) * N * V)  # two positions at a time
    states, embeddings, text = example(patch_size)
    weight = torch.rand(P, dtype=torch.float64)
    gradients = []
    for score in (decoded_brier, plainly):
        leaf = states.clone().requires_grad_()
        value = score(leaf, embeddings, text)
        (value * weight).sum().backward()
        gradients.append((value.detach(), leaf.grad))
    torch.testing.assert_close(gradients[0][0].double(), gradients[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0][1].double(), gradients[1][1], rtol=1e-4, atol=1e-6)


def test_it_is_largest_in_expectation_where_the_draws_have_the_law_of_the_text():
    """Draws that are certain of one patch of two tokens each; every law over four patches, enumerated."""
    patches = torch.tensor(list(product(range(2), repeat=2)))
    states, embeddings = 40.0 * torch.nn.functional.one_hot(patches, 2).float(), torch.eye(2)
    truth = torch.tensor([0.5, 0.1, 0.1, 0.3])

    def expected(law):
        total = 0.0
        for (i, p), (j, q), (y, r) in product(enumerate(law), enumerate(law), enumerate(truth)):
            score = decoded_brier(states[[i, j]][:, None], embeddings, patches[y][None])
            total += p * q * r * score.item()
        return total

    best = expected(truth)
    independent = torch.tensor([0.6 * 0.6, 0.6 * 0.4, 0.4 * 0.6, 0.4 * 0.4])  # the same marginals
    for other in (independent, torch.tensor([1.0, 0, 0, 0]), torch.full((4,), 0.25)):
        assert expected(other) < best - 0.01


def with_weight(weight, patch_size=4):
    model = tiny.calm(patch_size)
    weighted = CalmForCausalLM(CalmConfig(**{**model.config.to_dict(), "decoded_brier_weight": weight}))
    weighted.load_state_dict(model.state_dict())
    return model, weighted


def test_it_is_added_to_the_loss_and_reaches_head_and_backbone_alone():
    plain, model = with_weight(20.0)
    ids = tiny.tokens(2, 12)
    labels = ids.clone()
    labels[0, 8:] = -100
    arguments = {
        "labels": labels, "noise": torch.rand(4, 2, 2, 6) - 0.5, "target_noise": torch.randn(8, 2, 2, 8)
    }  # fmt: skip
    out = model(ids, **arguments)
    samples = model.head.sample(out.last_hidden_state[:, :-1], arguments["noise"])
    law = model.autoencoder.decode(samples).softmax(-1).double()  # [N, B, L, K, V]
    text = ids[:, 4:].view(2, 2, 4)
    right = law.gather(-1, text[None, ..., None].expand(4, -1, -1, -1, -1))[..., 0].cumprod(-1).mean(0)
    agree = torch.einsum("nblkv,mblkv->nmblk", law, law).cumprod(-1)
    pairs = sum(agree[i, j] for i in range(4) for j in range(4) if i != j) / 12
    score = (2 * right - pairs).mean(-1)
    brier = (score[0, 0] + score[1].sum()) / 3  # three patches are targets
    assert out.metrics["decoded_brier"].item() == pytest.approx(brier.item(), rel=1e-4, abs=1e-7)
    expected = plain(ids, **arguments).loss.item() - 20 * brier.item()
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    out.loss.backward()
    assert all(parameter.grad is None for parameter in model.autoencoder.parameters())
    assert model.head.output_layer.weight.grad.any()
    assert model.backbone.layers[0].self_attn.q_proj.weight.grad.any()


def test_the_energy_score_stays_what_it_was():
    plain, model = with_weight(20.0)
    ids, noise, targets = tiny.tokens(2, 8), torch.rand(4, 2, 1, 6) - 0.5, torch.randn(8, 2, 1, 8)
    out = model(ids, labels=ids, noise=noise, target_noise=targets)
    posterior = plain.autoencoder.encode(ids[:, 4:])
    draws = posterior.mean + posterior.log_std.exp() * targets
    samples = plain.head.sample(out.last_hidden_state[:, :-1], noise)
    torch.testing.assert_close(out.metrics["energy_score"], energy_score(samples, draws).mean())


def test_other_heads_and_negative_weights_are_refused():
    for head_type in ("flow", "diffusion"):
        fields = tiny.calm(type=head_type).config.to_dict()
        with pytest.raises(
            ValueError, match=f"decoded_brier_weight needs a head whose loss returns samples .energy.*'{head_type}'"
        ):
            CalmConfig(**{**fields, "decoded_brier_weight": 1.0})
    with pytest.raises(ValueError, match="decoded_brier_weight must be at least 0, got -1"):
        CalmConfig(**{**tiny.calm().config.to_dict(), "decoded_brier_weight": -1.0})


def test_half_precision_is_for_the_products_with_the_vocabulary_alone():
    """As a GPU trains: the model under autocast to bfloat16, the probabilities and their sums in float32."""
    states, embeddings, text = example(4, dtype=torch.float32)
    exact, mixed = states.clone().requires_grad_(), states.clone().requires_grad_()
    decoded_brier(exact, embeddings, text).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        score = decoded_brier(mixed, embeddings, text)
    assert score.dtype == torch.float32
    score.sum().backward()
    torch.testing.assert_close(score, decoded_brier(states, embeddings, text), rtol=0.05, atol=0.01)
    torch.testing.assert_close(mixed.grad, exact.grad, rtol=0.1, atol=0.01)

    model = tiny.calm(2).train()
    model.config.decoded_brier_weight = 1.0
    ids = torch.randint(2, tiny.VOCAB_SIZE, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(each.grad.isfinite().all() for each in model.head.parameters())
