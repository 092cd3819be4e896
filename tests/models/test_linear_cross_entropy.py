"""Cross-entropy without logits, against cross-entropy with them, in every precision."""

import pytest
import torch
import torch.nn.functional as F

from calm.functional import tiles
from calm.models.linear_cross_entropy import linear_cross_entropy

P, H, V = 4096, 16, 512


def example():
    torch.manual_seed(0)
    labels = torch.randint(V, (P,))
    labels[::7] = -100
    return torch.randn(P, H), torch.randn(V, H), labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_loss_and_gradients_are_those_of_the_logits(monkeypatch, dtype, tolerance):
    """Also the mean over many positions, which half precision would round to another number."""
    monkeypatch.setattr(tiles, "_TRAINING_ELEMENTS", 1000 * V)
    states, weight, labels = example()
    leaves = [each.to(dtype).requires_grad_() for each in (states, weight)]
    loss = linear_cross_entropy(*leaves, labels)
    loss.backward()
    exact = [each.detach().float().requires_grad_() for each in leaves]
    expected = F.cross_entropy(F.linear(*exact), labels)
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for leaf, reference in zip(leaves, exact, strict=True):
        error = (leaf.grad.float() - reference.grad).norm() / reference.grad.norm()
        assert error < max(0.02 * (dtype != torch.float32), 1e-4)


def test_without_the_function_of_torch_it_is_the_same(monkeypatch):
    states, weight, labels = example()
    expected = linear_cross_entropy(states, weight, labels)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    monkeypatch.setattr(tiles, "_TRAINING_ELEMENTS", 1000 * V)
    torch.testing.assert_close(linear_cross_entropy(states, weight, labels), expected, rtol=1e-5, atol=0)


def test_autocast_decides_the_precision_of_the_products():
    states, weight, labels = example()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(states, weight, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(states @ weight.T, labels), rtol=1e-2, atol=0)
