"""Choosing among candidates does not wait for the device."""

import torch
from counting.instrument import PRETEND, count

from calm.functional.counted_choice import choose_by_counts
from calm.functional.rng import RowStreams, normal, uniform


def test_low_temperature_chooses_without_a_read():
    candidates, uniforms = torch.randint(5, (4, 50, 4)).to(PRETEND), torch.rand(4, 1).to(PRETEND)
    with count() as counts:
        choose_by_counts(candidates, 0.4, uniforms)
    assert (counts.host_reads, counts.uploads) == (0, 0), counts.report()
    assert counts.launches <= 40, counts.report()


def test_random_numbers_of_rows_take_as_many_launches_for_one_row_as_for_64():
    launches = []
    for rows in (1, 64):
        streams = RowStreams(torch.arange(rows).to(PRETEND))
        with count() as counts:
            uniform((rows, 8), streams, PRETEND)
            normal((rows, 8), streams, PRETEND)
        assert (counts.host_reads, counts.uploads) == (0, 0), counts.report()
        launches.append(counts.launches)
    assert launches[1] == launches[0]
