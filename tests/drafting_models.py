"""Token models with random weights and preferences, and drafters of them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm.models.drafters import DRAFTERS, DrafterConfig
from calm.models.drafters.base import target_hash

PROMPTS = torch.tensor([[0, 0, 7, 3, 9], [5, 11, 2, 8, 4], [0, 6, 1, 12, 13]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_target(vocab_size=50, end=None, seed=0, scale=6.0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES, vocab_size=vocab_size, eos_token_id=end, pad_token_id=0, bos_token_id=None, initializer_range=0.2
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= scale  # a model with preferences
    return model


def make_drafter(target, drafter_type, shortlist=20, seed=1, **settings):
    torch.manual_seed(seed)
    config = DrafterConfig(
        drafter_type=drafter_type, num_tokens=4, hidden_size=32, num_attention_heads=4, shortlist_size=shortlist,
        feature_layers=(0, -1), target_hash=target_hash(target.config), **settings,
    )  # fmt: skip
    drafter = DRAFTERS[drafter_type](config).eval()
    drafter.shortlist.copy_(torch.arange(shortlist))
    return drafter.attach(target)
