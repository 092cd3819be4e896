import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from calm.functional import energy_score, energy_score_terms


def score_by_loops(samples, targets, alpha):
    n, m = len(samples), len(targets)
    within = sum((samples[i] - samples[j]).norm() ** alpha for i in range(n) for j in range(n) if i != j)
    across = sum((x - y).norm() ** alpha for x in samples for y in targets)
    return within / (n * (n - 1)) - 2 * across / (n * m)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_equals_its_definition_by_loops(alpha):
    samples, targets = torch.randn(5, 3, 4), torch.randn(7, 3, 4)
    score = energy_score(samples, targets, alpha)
    for item in range(3):
        torch.testing.assert_close(score[item], score_by_loops(samples[:, item], targets[:, item], alpha))


def test_approaches_the_closed_form_of_two_gaussians():
    # |X - X'| of N(m, s^2) in one dimension has mean 2 s / sqrt(pi); X - Y of different Gaussians is a folded normal.
    def mean_distance(mean, std):
        return std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * std**2)) + mean * math.erf(
            mean / (std * math.sqrt(2))
        )

    generator = torch.Generator().manual_seed(1)
    samples = 0.5 + 1.5 * torch.randn(64, 4000, 1, generator=generator)
    targets = torch.randn(64, 4000, 1, generator=generator)
    expected = 2 * 1.5 / math.sqrt(math.pi) - 2 * mean_distance(0.5, math.sqrt(1 + 1.5**2))
    score = energy_score(samples, targets)
    assert abs(score.mean().item() - expected) < 4 * score.std().item() / math.sqrt(len(score))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("shift", "scale"), [(0.3, 1.0), (0.0, 0.7), (0.0, 1.4)])
def test_the_true_distribution_scores_best(alpha, shift, scale):
    # Paired: the same noise makes the true and the wrong samples, so their difference has a small error.
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(8, 8000, 2, generator=generator)
    targets = torch.randn(8, 8000, 2, generator=generator)
    advantage = energy_score(noise, targets, alpha) - energy_score(shift + scale * noise, targets, alpha)
    assert advantage.mean() > 4 * advantage.std() / math.sqrt(len(advantage))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.7])
def test_gradient_is_finite_where_samples_coincide(alpha):
    samples = torch.zeros(4, 2, 3, requires_grad=True)
    energy_score(samples, torch.zeros(2, 2, 3), alpha).sum().backward()
    assert torch.equal(samples.grad, torch.zeros_like(samples))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_terms_are_the_mean_distances_between_samples_and_to_targets(alpha):
    samples, targets = torch.randn(3, 6, 2), torch.randn(4, 6, 2)
    diversity, fidelity = energy_score_terms(samples, targets, alpha)
    for item in range(6):
        torch.testing.assert_close(diversity[item], torch.pdist(samples[:, item]).pow(alpha).mean())
        torch.testing.assert_close(fidelity[item], torch.cdist(samples[:, item], targets[:, item]).pow(alpha).mean())


def test_distances_and_gradients_of_equal_points_are_zero_however_far_from_the_origin():
    """Samples on one of two targets c and -c: half of the distances are 0, the others |2c|; their gradient is c/|c|."""
    place = 100 * torch.randn(50, 64)
    samples = place.expand(4, -1, -1).clone().requires_grad_()
    score = energy_score(samples, torch.stack([place, -place]))
    size = place.norm(dim=-1)
    torch.testing.assert_close(score, -2 * size)
    score.sum().backward()
    torch.testing.assert_close(samples.grad, (-place / size[:, None] / 4).expand_as(samples), rtol=1e-4, atol=1e-6)


def test_accumulates_in_float32():
    assert energy_score(torch.randn(3, 2, 4).bfloat16(), torch.randn(3, 2, 4).bfloat16()).dtype == torch.float32


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 samples.*got 1"):
        energy_score(torch.randn(1, 3, 4), torch.randn(5, 3, 4))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(5, 3, 6\)"):
        energy_score(torch.randn(2, 3, 4), torch.randn(5, 3, 6))


@pytest.mark.parametrize("alpha", [0.0, 2.0, -1.0])
def test_improper_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 2\)"):
        energy_score(torch.randn(2, 4), torch.randn(5, 4), alpha)


class Products(TorchFunctionMode):
    """Records the precision that holds for every matrix product of a GPU."""

    def __init__(self):
        super().__init__()
        self.precisions = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if getattr(function, "__name__", "") in ("matmul", "__matmul__", "__rmatmul__"):
            self.precisions.append(torch.backends.cuda.matmul.fp32_precision)
        return function(*arguments, **(keywords or {}))


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has another setting")
def test_tf32_stays_out_of_the_distances_and_on_elsewhere():
    samples, targets = torch.randn(4, 3, 8, requires_grad=True), torch.randn(5, 3, 8)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with Products() as products:
            energy_score(samples, targets).sum().backward()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(products.precisions) >= 4
    assert set(products.precisions) == {"ieee"}


def test_no_gradient_is_computed_where_none_is_wanted():
    samples, targets = torch.randn(4, 3, 8, requires_grad=True), torch.randn(5, 3, 8)
    with torch.no_grad(), Products() as products:
        energy_score(samples, targets)
    assert len(products.precisions) == 2  # one for each of the two terms
    with Products() as products:
        energy_score(samples.detach(), targets)
    assert len(products.precisions) == 2
