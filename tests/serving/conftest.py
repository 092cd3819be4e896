import contextlib
import socket
import threading

import pytest
import torch
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM

from calm import CalmAutoencoder, CalmAutoencoderConfig, CalmForCausalLM
from calm.data.tokenizer import train_tokenizer
from calm.serving.app import create_app
from calm.serving.service import Limits, Service
from calm.serving.telemetry import Metrics

TEXTS = ["the quick brown fox jumps over the lazy dog", "über größere Öfen", "漢字 and \U0001f600 in a text"] * 20
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BACKBONE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="session")
def calm(tokenizer):
    torch.manual_seed(0)
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = CalmAutoencoderConfig(
        **tokens, patch_size=3, hidden_size=32, intermediate_size=48, latent_size=8, initializer_range=0.3
    )
    head = {"noise_size": 8, "num_mlp_layers": 1}
    model = CalmForCausalLM.from_autoencoder(CalmAutoencoder(config), BACKBONE | tokens, head, mtp_weight=1.0)
    for parameter in model.head.parameters():  # a new head gives one and the same latent
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.sampler = "batch"
    return model.eval()


@pytest.fixture(scope="session")
def baseline(tokenizer):
    torch.manual_seed(1)
    config = LlamaConfig(
        **BACKBONE, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def serving(models, limits=None, **options):
    """A real server on a free port of the loopback interface; gives its address and its services."""
    metrics = Metrics()
    services = [
        Service(name, *model, limits or Limits(max_batch=4, max_queue=64, context=400), metrics)
        for name, model in models
    ]
    server = uvicorn.Server(
        uvicorn.Config(create_app(services, metrics, **options), log_level="error", access_log=False)
    )
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", services
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
