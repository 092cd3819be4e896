"""Figures of generated texts, against counts by hand."""

import json
import math

import pytest
import torch
from tiny import calm
from transformers import LlamaConfig, LlamaForCausalLM

from calm.data.blocks import TokenBlocks
from calm.data.prepare import prepare
from calm.data.tokenizer import load_tokenizer, train_tokenizer
from calm.evaluation import generation_quality as fluency
from calm.evaluation.generation_quality import evaluate_fluency, fluency_of_text

DOCUMENTS = [" ".join(["alpha", "beta", "gamma", "delta"][(i * j) % 4] for j in range(40)) for i in range(30)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("fluency")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    prepare([root / "text.jsonl"], train_tokenizer(DOCUMENTS, 270), root / "data")
    return TokenBlocks(root / "data", 24), load_tokenizer(root / "data")


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=270, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_figures_are_those_counted_by_hand(data, judge, monkeypatch):
    blocks, tokenizer = data
    texts = [[5, 6, 5, 6, 5, 6, 5], [7, 8, 9]]
    monkeypatch.setattr(fluency, "continue_tokens", lambda *_, **__: (texts, None))
    result = evaluate_fluency(judge, judge, tokenizer, blocks, num_texts=2, prompt_tokens=4, new_tokens=7)
    # 4-grams of the first text: 5656 6565 5656 6565, of which two stand there before.
    assert result.repetition == 0.5
    assert result.distinct == {"1": 5 / 10, "2": 4 / 8, "4": 2 / 4}
    assert result.num_tokens == 10
    surprise = 0.0
    for row, text in enumerate(texts):
        prompt = blocks[blocks.spread(2)[row]]["input_ids"][:4].tolist()
        for place in range(len(text)):
            law = judge(torch.tensor([prompt + text[:place]])).logits[0, -1].log_softmax(-1)
            surprise -= law[text[place]].item()
    assert result.perplexity == pytest.approx(math.exp(surprise / 10), rel=1e-5)


def test_models_of_both_kinds_write_the_same_text_for_the_same_seed(data, judge):
    blocks, tokenizer = data
    for model, temperature in ((judge, 0.7), (calm(2, vocab_size=270), 0.5)):
        first, again, other = (
            evaluate_fluency(model, judge, tokenizer, blocks, 3, 4, 8, temperature, seed) for seed in (0, 0, 100)
        )
        assert first.samples == again.samples
        assert first.samples != other.samples
        assert first.temperature == temperature
        assert first.tokens_per_second > 0
        assert first.num_tokens <= 3 * 8


def test_the_documents_themselves_are_judged_alike(data, judge):
    blocks, tokenizer = data
    result = fluency_of_text(judge, tokenizer, blocks, 5, 8, 16)
    assert result.num_tokens == 5 * 16
    assert result.tokens_per_second is None
    assert result.perplexity > 1


def test_texts_that_do_not_fit_a_block_are_refused(data, judge):
    blocks, tokenizer = data
    with pytest.raises(ValueError, match=r"prompts and texts of 40 tokens do not fit into blocks of 24"):
        fluency_of_text(judge, tokenizer, blocks, 2, 20, 20)
