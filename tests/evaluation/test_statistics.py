"""Standard errors over blocks, against many texts drawn anew."""

import math

import pytest
import torch

from calm.evaluation.statistics import (
    MIN_BLOCKS,
    _resampled_means,
    _student_factor,
    brier_difference,
    brier_errors,
    error_to_stop_at,
)
from calm.functional.brier import brier_lm


def two_models(generator, num_blocks=60):
    """Brier scores of two models (times 100) on blocks that are hard or easy for both, ``[blocks, 4]`` each."""
    ease = torch.rand((num_blocks, 1), generator=generator, dtype=torch.float64)
    levels = torch.tensor([20.0, 10.0, 6.0, 4.0], dtype=torch.float64)
    first = levels * (0.5 + ease)
    own = 1 + 0.1 * torch.randn((num_blocks, 1), generator=generator, dtype=torch.float64)
    return 1.1 * first * own, first


def unequal_blocks(generator, num_blocks, document=1):
    """Brier scores of blocks as unequal as those of real text ``[blocks, 4]``; those of a document share difficulty."""
    mean = torch.tensor([0.10, 0.03, 0.012, 0.006], dtype=torch.float64)
    spread = torch.tensor([0.3, 0.6, 0.9, 1.2], dtype=torch.float64)
    shared = torch.randn((num_blocks, 1), generator=generator, dtype=torch.float64)
    own = torch.randn((num_blocks, 4), generator=generator, dtype=torch.float64)
    shared = shared[torch.arange(num_blocks) // document]
    return mean * torch.exp(spread * (0.8 * shared + 0.6 * own) - spread**2 / 2), brier_lm(mean)


def coverage(num_blocks, document, num_texts=300):
    """Share of texts where one error around the score holds the true BrierLM."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(num_texts):
        brier, true = unequal_blocks(generator, num_blocks, document)
        inside += abs(brier_lm(brier.mean(0)) - true).item() < brier_errors(brier)[0]
    return inside / num_texts


def documents_of_random_length(generator, num_blocks, mean=4):
    """Brier scores of blocks, equal within documents, whose lengths are geometric, and the document of every block."""
    begins = torch.rand(num_blocks, generator=generator) < 1 / mean
    documents = begins.cumsum(0)
    brier, true = unequal_blocks(generator, num_blocks + 1)
    return brier[documents], true, documents.tolist()


@pytest.mark.parametrize("num_blocks", [32, 64, 128])
def test_one_error_over_documents_of_random_length_covers_the_truth_in_two_thirds_of_texts(num_blocks):
    """68% are due; over runs of blocks it is 49% of 32 blocks and 58% of 64."""
    generator, inside, num_texts = torch.Generator().manual_seed(0), 0, 400
    for _ in range(num_texts):
        brier, true, documents = documents_of_random_length(generator, num_blocks)
        inside += abs(brier_lm(brier.mean(0)) - true).item() < brier_errors(brier, documents)[0]
    assert 0.61 < inside / num_texts < 0.76


def test_an_error_over_documents_is_the_jackknife_in_plain_words():
    brier, _, documents = documents_of_random_length(torch.Generator().manual_seed(3), 40)
    deviations = []
    for document in set(documents):
        others = [block for block, number in zip(brier, documents, strict=True) if number != document]
        deviations.append((brier_lm(torch.stack(others).mean(0)) - brier_lm(brier.mean(0))).item() ** 2)
    degrees = sum(deviations) ** 2 / sum(deviation**2 for deviation in deviations)
    variance = (len(deviations) - 1) / len(deviations) * sum(deviations)
    expected = math.sqrt(variance) * _student_factor(degrees)
    assert brier_errors(brier, documents)[0] == pytest.approx(expected)
    # Numbers of documents are names: their order means nothing.
    assert brier_errors(brier, [1000 - number for number in documents])[0] == pytest.approx(expected)


def test_a_text_of_one_document_has_the_error_over_runs_and_equal_blocks_have_none():
    brier, _, documents = documents_of_random_length(torch.Generator().manual_seed(3), 40)
    assert brier_errors(brier, [7] * 40) == brier_errors(brier)
    assert error_to_stop_at(brier, documents) >= brier_errors(brier, documents)[0]
    equal = torch.full((40, 4), 0.1, dtype=torch.float64)
    assert brier_errors(equal, documents)[0] == pytest.approx(0, abs=1e-9)
    assert brier_difference(brier.tolist(), brier.tolist(), documents) == (0, 0)
    better = (1.1 * brier).tolist()
    difference, error = brier_difference(better, brier.tolist(), documents)
    assert 0 < difference < 100
    assert error < brier_errors(brier, documents)[0]


@pytest.mark.parametrize("num_blocks", [32, 64, 128])
@pytest.mark.parametrize("document", [1, 4])
def test_one_error_covers_the_truth_in_two_thirds_of_texts(num_blocks, document):
    """68% are due; a plain bootstrap over blocks covers 62% of independent ones and 38% where four share a document."""
    assert 0.60 < coverage(num_blocks, document) < 0.78


def test_errors_are_those_of_other_texts_and_far_smaller_of_a_difference():
    generator = torch.Generator().manual_seed(0)
    differences, errors, scores, own_errors = [], [], [], []
    for _ in range(300):
        better, first = two_models(generator)
        difference, error = brier_difference(better.tolist(), first.tolist())
        assert difference == pytest.approx(brier_lm((better / 100).mean(0)) - brier_lm((first / 100).mean(0)))
        differences.append(difference)
        errors.append(error)
        scores.append(brier_lm((first / 100).mean(0)))
        own_errors.append(brier_errors(first / 100)[0])
    differences, errors, scores, own_errors = map(torch.tensor, (differences, errors, scores, own_errors))
    assert errors.mean() == pytest.approx(differences.std().item(), rel=0.2)
    assert own_errors.mean() == pytest.approx(scores.std().item(), rel=0.2)
    assert errors.mean() < own_errors.mean() / 2


def test_errors_of_single_scores_are_those_of_a_mean():
    """64 independent blocks: the error of a mean is the standard deviation over the root of the count."""
    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(200):
        errors.append(brier_errors(torch.randn((64, 4), generator=generator, dtype=torch.float64) + 9)[1])
    assert torch.tensor(errors).mean(0).tolist() == pytest.approx([1 / 8] * 4, rel=0.15)


def test_samples_are_those_of_resampled_runs_and_alike_for_all_models():
    first, second = torch.rand((2, 40, 4), dtype=torch.float64)
    torch.testing.assert_close(
        _resampled_means(first, 8) + _resampled_means(second, 8), _resampled_means(first + second, 8)
    )
    # Every mean is one of whole runs of five.
    fives = torch.arange(8.0, dtype=torch.float64).repeat_interleave(5)[:, None]
    assert torch.equal((8 * _resampled_means(fives, 8)).round(), 8 * _resampled_means(fives, 8))
    # 1,000 blocks are sampled in two pieces.
    assert _resampled_means(torch.rand(2000, 1), 2000).shape == (1000, 1)


def test_the_widening_is_the_quantile_of_students_distribution():
    """From 3 degrees of freedom, half-widths that hold 68.27% (scipy: t.ppf(0.841345, degrees))."""
    exact = {3: 1.196886, 7: 1.076664, 15: 1.034464, 100: 1.005025}
    assert [_student_factor(degrees) for degrees in exact] == pytest.approx(list(exact.values()), abs=5e-4)


def test_a_model_does_not_differ_from_itself_and_few_blocks_have_no_error():
    blocks = two_models(torch.Generator().manual_seed(0))[0].tolist()
    assert brier_difference(blocks, blocks) == (0, 0)
    assert brier_difference(blocks[:31], blocks[:31]) == (0, None)
    assert brier_difference(blocks[:32], blocks[:32]) == (0, 0)
    # BrierLM is 0 for both where a Brier score is not above 0, which does not make them equal.
    lost = [[*block[:3], -1.0] for block in blocks]
    assert brier_difference(lost, [[2 * block[0], *block[1:]] for block in lost]) == (0, None)
    with pytest.raises(ValueError, match="brier_difference compares the same blocks, got 7 and 8 of them"):
        brier_difference(blocks[:7], blocks[:8])


def test_no_evaluation_ends_on_few_blocks_or_by_chance():
    generator = torch.Generator().manual_seed(0)
    equal = torch.full((MIN_BLOCKS, 4), 0.1, dtype=torch.float64)
    assert error_to_stop_at(equal) == pytest.approx(0, abs=1e-9)
    assert [brier_errors(equal)[0], *brier_errors(equal)[1]] == pytest.approx([0] * 5, abs=1e-9)
    assert error_to_stop_at(equal[1:]) == math.inf
    assert brier_errors(equal[1:]) is None
    for _ in range(20):
        brier, _ = unequal_blocks(generator, 40)
        assert error_to_stop_at(brier) >= brier_errors(brier)[0]
    # Runs that are equal by chance do not hide that blocks differ.
    alternating = torch.tensor([0.05, 0.15], dtype=torch.float64).repeat(32)[:, None].expand(-1, 4)
    assert brier_errors(alternating)[0] < 1e-9
    assert error_to_stop_at(alternating) == pytest.approx(100 * 0.05 / 8, rel=0.1)
    # Where BrierLM is 0 for certain, the scores themselves are still uncertain.
    assert error_to_stop_at(alternating - 0.2) == pytest.approx(100 * 0.05 / 8, rel=0.1)
