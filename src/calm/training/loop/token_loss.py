"""Training of token models without their logits."""

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from calm.models.linear_cross_entropy import linear_cross_entropy


def use_linear_cross_entropy(model: PreTrainedModel) -> None:
    """Make a causal language model compute its loss without holding logits; with labels, it returns the loss alone.

    Models whose logits are more than a product with the output embedding (a bias, a scale, a soft cap) stay as they
    are.
    """
    # Small logits of a new model would not show a soft cap.
    if any("logit" in name and value for name, value in model.config.to_dict().items()):
        return
    plain_forward = model.forward
    forward: Any = partial(_forward, model, plain_forward)  # no closure: a copy of the model has its own weights
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    was_training = model.training
    model.eval()  # dropout would make two losses of it
    with torch.no_grad():
        same = torch.allclose(plain_forward(ids, labels=ids).loss, forward(ids, labels=ids).loss, rtol=1e-4)
    model.train(was_training)
    if same:
        model.forward = forward


def _forward(model: Any, plain_forward: Any, input_ids, labels=None, attention_mask=None, **kwargs):
    if labels is None:
        return plain_forward(input_ids, attention_mask=attention_mask, **kwargs)
    outputs = model.base_model(input_ids, attention_mask=attention_mask, **kwargs)
    states = outputs.last_hidden_state[:, :-1].flatten(0, 1)
    # Not the loss function of transformers: it wants logits.
    loss = linear_cross_entropy(states, model.get_output_embeddings().weight, labels[:, 1:].flatten())
    return CausalLMOutputWithPast(loss=loss)
