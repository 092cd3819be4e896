import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm import CalmAutoencoderConfig, CalmConfig, CalmForCausalLM
from calm.evaluation.compute import compute


def published(layers, hidden, intermediate):
    return {
        "vocab_size": 128257,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
    }


def test_inference_flops_are_the_papers_for_transformer_s():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**published(12, 768, 2048)))
    cost = compute(model, context=2048)
    assert cost.parameters == pytest.approx(281e6, rel=0.01)
    assert cost.inference_flops_per_token == pytest.approx(4.4e8, rel=0.02)


def test_inference_flops_are_the_papers_for_calm_m():
    with torch.device("meta"):
        config = CalmConfig(backbone_config=published(16, 1024, 2752), autoencoder_config=CalmAutoencoderConfig())
        model = CalmForCausalLM(config)
    cost = compute(model, context=4 * 2048)
    assert cost.parameters == pytest.approx(371e6, rel=0.01)
    assert cost.inference_flops_per_token == pytest.approx(2.9e8, rel=0.03)
