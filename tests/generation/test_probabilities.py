"""``top_p`` and log-probabilities, where the probabilities of tokens are known."""

import itertools

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm import SamplingParams
from calm.functional.temperature import sharpened
from calm.generation.model_runner import model_runner
from calm.generation.samplers import find_sampler

KINDS = {
    "independent": {"token_prediction": "independent"},
    "autoregressive": {"token_prediction": "autoregressive"},
    "direct": {"type": "categorical_flow"},
    "shortlist": {"type": "categorical_flow", "shortlist_size": 4},
}


def model_of(kind, patch_size=2, vocab_size=6):
    return tiny.calm(patch_size, vocab_size=vocab_size, **KINDS[kind]), "mtp" if "token" in str(
        KINDS[kind]
    ) else "direct"


def nucleus(probs, top_p):
    """The definition, token by token: the most likely ones until they have the probability ``top_p`` together."""
    kept, total = [], 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        kept.append(token)
        total += probs[token]
        if total >= top_p:
            break
    return torch.tensor([probs[token] / total if token in kept else 0.0 for token in range(len(probs))])


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_top_p_keeps_the_fewest_most_likely_tokens_with_this_probability(temperature, top_p):
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    without = sharpened(logits, temperature)
    expected = torch.stack([nucleus(row.tolist(), top_p) for row in without])
    torch.testing.assert_close(sharpened(logits, temperature, top_p), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_patch_has_the_law_of_its_tokens_nuclei(kind):
    model, sampler = model_of(kind)
    hidden = model(tiny.tokens(1, 4) % 6).last_hidden_state[:, -1]
    params = SamplingParams(0.8, sampler, top_p=0.6).with_defaults()
    count = 20_000
    drawn = model.sample_patch(hidden.expand(count, -1), params, torch.Generator().manual_seed(1)).tokens
    patches = torch.tensor(list(itertools.product(range(6), repeat=2)))
    logprobs = find_sampler(sampler).score(model, hidden.expand(len(patches), -1), patches)[0].tokens.view(6, 6, 2)
    first = nucleus(sharpened(logprobs[:, 0, 0], 0.8).tolist(), 0.6)
    second = torch.stack([nucleus(sharpened(row, 0.8).tolist(), 0.6) for row in logprobs[..., 1]])
    expected = first[:, None] * second
    assert 1 < (expected > 0).sum() < 36
    observed = torch.bincount(drawn @ torch.tensor([6, 1]), minlength=36).view(6, 6)
    assert (observed[expected == 0] == 0).all()
    often = expected > 0
    statistic = ((observed - count * expected).square() / (count * expected))[often].sum()
    freedom = int(often.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_a_token_model_samples_from_its_nucleus():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny.backbone(vocab_size=6), pad_token_id=0)).eval()
    runner = model_runner(model)
    params = runner.resolve(SamplingParams(0.8, top_p=0.6))
    hidden, *_ = runner.prefill([[1, 2, 3]])
    with torch.no_grad():
        probs = nucleus(sharpened(model(torch.tensor([[1, 2, 3]])).logits[0, -1], 0.8).tolist(), 0.6)
        drawn = runner.sample(hidden.expand(5000, -1), params, torch.Generator().manual_seed(0)).tokens[:, 0]
    observed = torch.bincount(drawn, minlength=6) / 5000
    assert 1 < (probs > 0).sum() < 6
    torch.testing.assert_close(observed, probs, atol=0.03, rtol=0)
    assert (observed[probs == 0] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", list(KINDS))
def test_logprobs_of_generate_are_those_of_a_forward_pass(kind):
    """Not those of the sharpened distribution: temperature and top_p do not change them."""
    model, sampler = model_of(kind, vocab_size=tiny.VOCAB_SIZE)
    model.generation_config.eos_token_id = None
    ids = tiny.tokens(2, 6)
    out = model.generate(
        ids, max_new_tokens=7, sampler=sampler, temperature=0.7, top_p=0.9, logprobs=3, return_dict_in_generate=True
    )
    assert out.logprobs.shape == (2, 7)
    assert out.top_logprobs.shape == out.top_ids.shape == (2, 7, 3)
    whole = torch.cat([out.sequences, out.sequences[:, :1]], dim=1)  # a multiple of the patch size
    hidden = model(whole).last_hidden_state
    for index in range(7):
        patch, place = divmod(6 + index, 2)
        given = whole.view(2, -1, 2)[:, patch].repeat_interleave(tiny.VOCAB_SIZE, 0)
        given[:, place] = torch.arange(tiny.VOCAB_SIZE).repeat(2)
        states = hidden[:, patch - 1].repeat_interleave(tiny.VOCAB_SIZE, 0)
        law = find_sampler(sampler).score(model, states, given)[0].tokens[:, place].view(2, -1)
        torch.testing.assert_close(law.exp().sum(1), torch.ones(2))
        torch.testing.assert_close(out.logprobs[:, index], law.gather(1, whole[:, 6 + index, None])[:, 0])
        torch.testing.assert_close(out.top_logprobs[:, index], law.topk(3).values)
        torch.testing.assert_close(law.gather(1, out.top_ids[:, index]), law.topk(3).values)
    if kind == "independent":
        states = model.token_predictor.proj(hidden[:, 2:-1]).unflatten(-1, (2, -1)).flatten(1, 2)
        law = (states @ model.get_input_embeddings().weight.T).log_softmax(-1)[:, :7]
        torch.testing.assert_close(out.logprobs, law.gather(-1, whole[:, 6:13, None])[..., 0])
    with pytest.raises(ValueError, match="logprobs are fields of the output object"):
        model.generate(ids, sampler=sampler, logprobs=3)


@torch.no_grad()
def test_a_token_model_and_a_calm_are_scored_through_one_interface():
    torch.manual_seed(0)
    token_model = LlamaForCausalLM(LlamaConfig(**tiny.backbone(), eos_token_id=1, pad_token_id=0)).eval()
    contexts, continuations = [[5, 6, 7, 8], [], [9]], [[3, 4, 5], [6], [7, 8]]
    found = model_runner(token_model).score(contexts, continuations)
    for context, continuation, (log_likelihood, is_greedy) in zip(contexts, continuations, found, strict=True):
        ids = torch.tensor([(context or [1]) + continuation])
        law = token_model(ids).logits[0, -len(continuation) - 1 : -1].log_softmax(-1)
        expected = law.gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert log_likelihood == pytest.approx(expected, abs=1e-4)
        assert is_greedy == law.argmax(-1).eq(torch.tensor(continuation)).all()
    calm = model_runner(tiny.calm(2, token_prediction="independent"))
    assert len(calm.score(contexts, continuations, "mtp")) == 3
    with pytest.raises(ValueError, match="likelihoods need a sampler with token probabilities, got sampler batch: use"):
        calm.score(contexts, continuations, "batch")
    with pytest.raises(ValueError, match="sampler is a setting of a CALM"):
        model_runner(token_model).score(contexts, continuations, "mtp")


@pytest.mark.parametrize("token_id", [-1, 10**5])
def test_tokens_outside_the_vocabulary_of_a_token_model_are_named(token_id):
    runner = model_runner(LlamaForCausalLM(LlamaConfig(**tiny.backbone(), eos_token_id=1, pad_token_id=0)))
    ids = torch.tensor([[1, token_id]])
    with pytest.raises(ValueError, match=rf"the model's vocabulary.*{token_id}.*is it this model's tokenizer"):
        runner.generate(ids, torch.ones_like(ids), SamplingParams(max_new_tokens=2))
