"""The counting device itself, on small functions whose counts are known."""

import pytest
import torch
from counting.instrument import PRETEND, count


def _counts(function, *tensors):
    on_device = [tensor.to(PRETEND) for tensor in tensors]
    with count() as counts:
        function(*on_device)
    return counts


@pytest.mark.parametrize(
    ("function", "launches", "reads", "uploads"),
    [
        (lambda x: x + 1, 1, 0, 0),
        (lambda x: (x * 2).sum(), 2, 0, 0),
        (lambda x: x[1:].view(-1, 1).T, 0, 0, 0),
        (lambda x: x.item() if x.dim() == 0 else float(x[0]), 0, 1, 0),
        (lambda x: x.cpu(), 0, 1, 0),
        (lambda x: x.tolist(), 0, 1, 0),
        (lambda x: bool((x > 0).all()), 2, 1, 0),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device), 1, 0, 1),
        (lambda x: x[x > 0], 2, 1, 0),
        (lambda x: x[[0, 2]], 1, 0, 1),
        (lambda x: x.nonzero(), 1, 1, 0),
        (lambda x: x.copy_(torch.zeros(3)), 0, 0, 1),
        (lambda x: torch.zeros(3, device=x.device), 1, 0, 0),
    ],
)
def test_launches_reads_and_uploads_of_known_functions(function, launches, reads, uploads):
    counts = _counts(function, torch.randn(3))
    assert (counts.launches, counts.host_reads, counts.uploads) == (launches, reads, uploads), counts.report()


def test_results_are_those_of_the_processor():
    x, weight = torch.randn(4, 3), torch.randn(3, 3)

    def loss(x, weight):
        weight = weight.detach().requires_grad_()
        result = (x @ weight).softmax(-1).square().sum()
        result.backward()
        return result.detach(), weight.grad

    expected = loss(x, weight)
    on_device = loss(x.to(PRETEND), weight.to(PRETEND))
    assert all(torch.equal(one.cpu(), other) for one, other in zip(on_device, expected, strict=True))


def test_double_precision_is_counted():
    assert _counts(lambda x: x.double() * 2 + x, torch.randn(3)).float64 == 3


def test_moved_bytes_count_an_expanded_tensor_once():
    assert _counts(lambda x: x.expand(5, 4) + 1, torch.randn(1, 4)).bytes_moved == 4 * 4 + 5 * 4 * 4


def test_tensors_of_two_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="processor and of the device"):
        _counts(lambda x: x + torch.zeros(3), torch.randn(3))


def test_a_backward_pass_is_counted():
    def train(x):
        x.requires_grad_()
        (x * 2).sum().backward()

    assert _counts(train, torch.randn(3)).launches >= 3


def test_nothing_chooses_the_device_by_itself():
    assert torch.accelerator.current_accelerator(check_available=True) != PRETEND
    assert not getattr(torch, PRETEND.type).is_available()
