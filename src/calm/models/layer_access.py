"""Weights that are used without the forward pass of their layer, and the device that a model computes on.

Some code uses a part of a weight, or an input embedding as an output layer, without calling the layer. That is correct
only if the layer is its weight and nothing else. Quantised layers, layers with an adapter, and layers whose weights are
offloaded to another device are used through their own forward pass.

Shapes: V vocabulary, E embedding, ... any leading dimensions.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_plain(layer: nn.Module, layer_type: type[nn.Module] = nn.Linear) -> bool:
    """Return whether a layer is its weight and bias and nothing else.

    False for another type of layer, for a quantised weight, for an adapter around the layer and for a hook on it.
    """
    if type(layer) is not layer_type or type(layer.weight) not in (nn.Parameter, Tensor):
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook")  # the last is accelerate's
    return not hooked


def has_adapter(model: nn.Module) -> bool:
    """Return whether any layer of a model is inside an adapter of peft."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def embedding_matrix(embedding: nn.Module, vocab_size: int, device: torch.device) -> Tensor:
    """Return the vectors of all tokens, ``[V, E]``, also of quantised and offloaded embeddings.

    A factor that an embedding applies to its output (Gemma's) is left out, as in an output layer of the same weight.

    Args:
        vocab_size: V.
        device: device on which the vectors are used.
    """
    if isinstance(embedding, nn.Embedding) and type(embedding.weight) in (nn.Parameter, Tensor):
        if not hasattr(embedding, "_hf_hook"):
            return embedding.weight
        from accelerate.utils import align_module_device

        with align_module_device(embedding):
            return embedding.weight.to(device)
    return embedding(torch.arange(vocab_size, device=device))


def device_of(model: Any) -> torch.device:
    """Return the device of the inputs of a model.

    It is the device of the weights or, for a model that accelerate spread over devices, the one on which the input
    embeddings are computed: offloaded weights have no device.
    """
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(model.parameters()).device
