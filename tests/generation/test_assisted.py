"""``generate(..., assistant_model=...)`` with a drafter or a CALM: the text is that of the target."""

import itertools

import pytest
import tiny
import torch
from drafting_models import MASK, PROMPTS, SIZES, make_drafter, make_target
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from calm.data.tokenizer import train_tokenizer
from calm.generation.assisted import CalmCandidates, DrafterCandidates
from calm.models.drafters import DRAFTERS, Draft

GREEDY = {"max_new_tokens": 30, "do_sample": False}


@pytest.mark.parametrize("drafter_type", sorted(DRAFTERS))
def test_greedy_text_with_a_drafter_is_that_of_the_target(drafter_type):
    target = make_target()
    drafter = make_drafter(target, drafter_type)
    for row, mask in zip(PROMPTS[:, None], MASK[:, None], strict=True):
        expected = target.generate(row, attention_mask=mask, **GREEDY)
        found = target.generate(row, attention_mask=mask, assistant_model=drafter, num_assistant_tokens=3, **GREEDY)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("drafter_type", sorted(DRAFTERS))
def test_candidates_are_those_of_our_own_loop_and_have_their_law(drafter_type):
    """``generate`` of transformers accepts by the logits of the candidates: they must be what was sampled from."""
    target = make_target(vocab_size=6, scale=1.5)
    drafter = make_drafter(target, drafter_type, shortlist=4)
    ids = torch.tensor([[3, 1, 2]])
    outputs = target(ids[:, :-1], output_hidden_states=True)
    config = GenerationConfig(do_sample=True, temperature=0.7, max_length=50)
    first, second = torch.zeros(6), torch.zeros(6)
    for _ in range(600):
        candidates = DrafterCandidates(drafter, target, config)
        assert candidates.get_candidates(ids, {}, None, True, 0)[0].tolist() == ids.tolist()
        text, logits = candidates.get_candidates(ids, {}, outputs, False, 0)
        assert logits.shape == (1, 4, 6)
        first[text[0, 3]] += 1
        law = logits[0, 0].softmax(-1)
        if text[0, 3] == 0:
            second[text[0, 4]] += 1
            law_of_second = logits[0, 1].softmax(-1)
    for counts, expected in ((first, law), (second, law_of_second)):
        expected = expected * counts.sum()
        assert counts[4:].sum() == 0
        assert float(((counts - expected) ** 2 / expected)[:4].sum()) < 21  # 3 degrees of freedom, about 1 in 10,000


@pytest.mark.slow
def test_sampled_texts_have_the_distribution_of_the_target():
    size, rows = 4, 2500
    target = make_target(vocab_size=size, scale=1.5)
    drafter = make_drafter(target, "mtp", shortlist=3)  # one token is never drafted
    law = torch.zeros(size, size, size, dtype=torch.float64)
    for x, y, z in itertools.product(range(size), repeat=3):
        logits = target(torch.tensor([[3, 1, x, y, z]])).logits[0].detach().double()
        log_probs = (logits / 0.8).log_softmax(-1)
        law[x, y, z] = (log_probs[1, x] + log_probs[2, y] + log_probs[3, z]).exp()
    counts = torch.zeros_like(law)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 4, "assistant_model": drafter}
    for _ in range(rows):
        text = target.generate(torch.tensor([[3, 1]]), **options)[0]
        counts[tuple(text[2:5])] += 1

    def statistic(law):
        expected = law * rows
        common = expected > 5
        return float(((counts - expected) ** 2 / expected)[common].sum()), int(common.sum()) - 1

    value, freedom = statistic(law)
    limit = freedom + 3.7 * (2 * freedom) ** 0.5 + 5  # about once in 10,000
    assert value < limit
    wrong = law**0.7  # another temperature would be found
    assert statistic(wrong / wrong.sum())[0] > limit


def calm_and_target(kind):
    calm = tiny.calm(4, "categorical_flow") if kind == "direct" else tiny.calm(4, token_prediction="autoregressive")
    torch.manual_seed(3)
    target = make_target(vocab_size=tiny.VOCAB_SIZE)
    return calm, target


@pytest.mark.parametrize("kind", ["direct", "mtp"])
def test_greedy_text_with_a_calm_is_that_of_the_target(kind):
    calm, target = calm_and_target(kind)
    for row, mask in zip(PROMPTS[:, None], MASK[:, None], strict=True):
        expected = target.generate(row, attention_mask=mask, **GREEDY)
        found = target.generate(row, attention_mask=mask, assistant_model=calm, **GREEDY)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["direct", "mtp"])
def test_a_calm_drafts_its_own_text_from_anywhere_in_a_patch(kind):
    calm, target = calm_and_target(kind)
    prompt = PROMPTS[1:2]
    calm.generation_config.sampler = kind
    text = calm.generate(prompt, max_new_tokens=24, temperature=0)
    config = GenerationConfig(max_length=100)
    candidates = CalmCandidates(calm, target, config, prompt)
    for length in (5, 6, 8, 9, 10, 16, 17):
        found, logits = candidates.get_candidates(text[:, :length], {}, None, False, 0)
        assert logits is None
        assert found.tolist() == text[:, : length + 4].tolist(), length
    longer = text.repeat(1, 9)  # than the context of the CALM: no candidates
    config.max_length = 1000
    found, _ = CalmCandidates(calm, target, config, prompt).get_candidates(longer, {}, None, False, 0)
    assert found.tolist() == longer.tolist()


def test_right_drafts_save_passes_and_stop_strings_end_a_text_where_they_end_it_without_them():
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 20, 290)
    target = make_target(vocab_size=len(tokenizer))
    drafter = make_drafter(target, "mtp", shortlist=290)
    prompt = torch.tensor([[5, 11, 2, 8, 4]])
    free = target.generate(prompt, **GREEDY)[0].tolist()

    def perfect(features, token_ids, *args, **kwargs):  # a draft of the text itself
        place = next(index for index in range(5, len(free)) if free[: index + 1] == texts[-1])
        return Draft(torch.tensor([free[place + 1 : place + 5]]), None)

    texts, drafter.propose = [], perfect
    get_candidates = DrafterCandidates.get_candidates

    def follow(self, input_ids, *args, **kwargs):
        texts.append(input_ids[0].tolist())
        return get_candidates(self, input_ids, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DrafterCandidates, "get_candidates", follow)
        assert target.generate(prompt, assistant_model=drafter, **GREEDY)[0].tolist() == free
    assert len(texts) == 7  # 1 token, then 5 in every pass
    for position in range(8, 20):
        options = GREEDY | {"stop_strings": [tokenizer.decode(free[position : position + 1])], "tokenizer": tokenizer}
        expected = target.generate(prompt, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DrafterCandidates, "get_candidates", follow)
            found = target.generate(prompt, assistant_model=drafter, **options)
        assert found.tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
def test_wrong_use_is_refused_in_one_line():
    target = make_target()
    drafter = make_drafter(target, "mtp")

    def refused(match, model=target, assistant=drafter, prompt=PROMPTS[1:2], **options):
        with pytest.raises(ValueError, match=match) as error:
            model.generate(prompt, assistant_model=assistant, **GREEDY | options)
        assert "\n" not in str(error.value)

    refused("one prompt at a time in transformers, got 3", prompt=PROMPTS)
    refused("greedy search and sampling, not with beam_search", num_beams=2)
    refused("one text at a time, got num_return_sequences=2", do_sample=True, num_return_sequences=2)
    refused("changes the distribution", assistant_ensemble_weight=0.5)
    cache = target(PROMPTS[1:2, :3]).past_key_values
    refused("cannot continue a cache of earlier tokens", past_key_values=cache)
    refused("trained for another target", model=make_target(vocab_size=60))
    window = MistralForCausalLM(MistralConfig(**SIZES, vocab_size=50, num_key_value_heads=4, sliding_window=8))
    calm, same_tokens = calm_and_target("mtp")
    refused("CALM has 48 tokens and the model 50", assistant=calm)
    refused("this one has none", model=same_tokens, assistant=tiny.calm(4))
    adapted = get_peft_model(make_target(), LoraConfig(r=2, target_modules=["q_proj"]))
    refused("this model has an adapter", model=adapted)
    drafter.config.target_hash = ""
    refused("sliding_window cannot be verified", model=window)
