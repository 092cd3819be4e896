"""Models whose hidden states or caches mean something else are refused where these are read."""

import pytest
import tiny
import torch
from transformers import GraniteConfig, GraniteForCausalLM, MistralConfig, MistralForCausalLM

from calm.generation.model_runner import model_runner
from calm.models.capabilities import check_full_attention, check_plain_logits

SIZES = {
    "vocab_size": tiny.VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def test_scaled_logits_are_not_served():
    with pytest.raises(ValueError, match="a granite model with logits_scaling cannot be served: only plain logits"):
        model_runner(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0))).check_steps("served")
    check_plain_logits(GraniteConfig(**SIZES, logits_scaling=1.0), "served")


def test_windows_and_attention_without_masks_are_refused():
    with pytest.raises(ValueError, match=r"a mistral backbone with .* cannot be scored: only full attention"):
        check_full_attention(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).config, "scored")
    config = tiny.calm().config.backbone_config
    check_full_attention(config, "scored")
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attn_implementation=flash_attention_2 cannot be scored: .*sdpa"):
        check_full_attention(config, "scored")


def test_windows_are_not_compiled():
    model = tiny.calm()
    model.config.backbone_config.sliding_window = 2
    with pytest.raises(ValueError, match="sliding_window cannot be compiled"):
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=4, compile=True)
