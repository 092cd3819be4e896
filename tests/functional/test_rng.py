"""Random numbers of rows that follow from seed, row and position alone."""

import pytest
import torch

from calm.functional.rng import RowStreams, normal, of_rows, uniform

N = 100_000


def test_a_row_has_the_same_numbers_in_any_batch():
    seeds = torch.tensor([5, 9, 5, 2**62])
    whole = uniform((3, 4, 7), RowStreams(seeds))  # rows are the last dimension but one
    for row in range(4):
        alone = uniform((3, 1, 7), RowStreams(seeds[row : row + 1]))
        assert torch.equal(whole[:, row], alone[:, 0])
    assert torch.equal(whole[:, 0], whole[:, 2])
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_numbers_in_one_piece_are_those_in_many():
    whole = normal((2, 12), RowStreams(torch.tensor([1, 2])))
    streams = RowStreams(torch.tensor([1, 2]))
    assert torch.equal(whole, torch.cat([normal((2, size), streams) for size in (1, 4, 7)], dim=1))


def test_what_some_rows_draw_the_whole_has_drawn():
    streams, expected = RowStreams(torch.arange(4)), uniform((4, 6), RowStreams(torch.arange(4)))
    some = of_rows(streams, torch.tensor([3, 1]))
    part = of_rows(some, torch.tensor([0]))
    assert torch.equal(uniform((1, 2), part)[0], expected[3, :2])
    assert streams.positions.tolist() == [0, 0, 0, 2]
    assert torch.equal(uniform((2, 1), of_rows(streams, slice(2, 4)))[:, 0], expected[[2, 3], [0, 2]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_uniform_numbers_are_below_one_and_uniform(dtype):
    numbers = uniform((10, N // 10), RowStreams(torch.arange(10)), dtype=dtype)
    assert numbers.dtype == dtype
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers.float(), 32, 0, 1)
    chi_square = ((counts - N / 32).square() / (N / 32)).sum()
    assert chi_square < 64  # 31 degrees of freedom; 64 has a probability of 0.0005


def test_normal_numbers_are_normal_and_independent():
    numbers = normal((2, N), RowStreams(torch.tensor([0, 1])), dtype=torch.float64)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        error = numbers.pow(2 * power).mean().sqrt() / (2 * N) ** 0.5
        assert abs(numbers.pow(power).mean() - moment) < 4 * error
    first, second = numbers
    for one, other in ((first, second), (first[1:], first[:-1]), (first[2:], first[:-2])):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 4 / N**0.5


def test_neighbouring_seeds_share_no_numbers():
    bits = RowStreams(torch.arange(100)).bits(1000)
    assert len(bits.unique()) == bits.numel()


def test_the_numbers_are_those_of_splitmix():
    """The definition, in whole numbers of Python."""

    def mix(number):
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return number ^ number >> 31

    expected = [mix((mix(42) + place * 0x9E3779B97F4A7C15) % 2**64) for place in (1, 2, 3)]
    assert [number % 2**64 for number in RowStreams(torch.tensor([42])).bits(3)[0].tolist()] == expected


def test_as_many_streams_as_rows_are_needed():
    with pytest.raises(ValueError, match="2 generators were given for 3 rows"):
        uniform((3, 1), RowStreams(torch.arange(2)))
