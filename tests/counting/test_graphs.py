"""A compiled training step is one graph, which later steps do not compile again."""

import pytest
import tiny
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from calm.compat.masking import no_packed_sequences
from calm.functional.rng import RowStreams
from calm.training.loop.token_loss import use_linear_cross_entropy

# torch's own, while it traces a function with a gradient.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def _calm(type, decoded_brier=False):
    model = tiny.calm(type=type, token_prediction="autoregressive").train()
    model.config.decoded_brier_weight = 1.0 if decoded_brier else 0.0
    return model


def _baseline():
    model = LlamaForCausalLM(LlamaConfig(**tiny.backbone())).train()
    use_linear_cross_entropy(model)
    return model


MODELS = {
    "energy": lambda: _calm("energy"),
    "energy with decoded Brier": lambda: _calm("energy", decoded_brier=True),
    "flow": lambda: _calm("flow"),
    "diffusion": lambda: _calm("diffusion"),
    "categorical flow": lambda: _calm("categorical_flow"),
    "autoencoder": lambda: tiny.autoencoder().train(),
    "baseline": _baseline,
}


_FAST = ("energy", "categorical flow", "baseline")


@pytest.mark.parametrize(
    ("name", "half"),
    [
        *(pytest.param(name, False, marks=[] if name in _FAST else pytest.mark.slow) for name in MODELS),
        pytest.param("energy", True, marks=pytest.mark.slow),
        pytest.param("baseline", True, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_is_one_graph(name, half):
    model = MODELS[name]()
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, dynamic=False)
    for step in range(2):
        ids = tiny.tokens(2, 16)
        streams = {} if name == "baseline" else {"generator": RowStreams(torch.arange(2) + step)}
        with no_packed_sequences(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = compiled(input_ids=ids, labels=ids, **streams).loss
        loss.backward()
    torch._dynamo.reset()
    assert not counters["graph_break"], counters["graph_break"]
    assert len(graphs) == 1
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["energy", "categorical flow"])
def test_a_compiled_step_has_the_loss_and_gradients_of_the_eager_one(name):
    model, ids = MODELS[name](), tiny.tokens(2, 16)
    results = []
    torch._dynamo.reset()
    for step in (model, torch.compile(model, backend="aot_eager", dynamic=False)):
        model.zero_grad()
        with no_packed_sequences():
            loss = step(input_ids=ids, labels=ids, generator=RowStreams(torch.arange(2))).loss
        loss.backward()
        results.append([loss.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)])
    torch._dynamo.reset()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
