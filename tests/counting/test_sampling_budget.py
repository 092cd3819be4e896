"""Choosing among candidates does not wait for the device."""

import pytest
import tiny
import torch
from counting.instrument import PRETEND, count

from calm.functional.counted_choice import choose_by_counts
from calm.functional.rng import RowStreams, normal, uniform
from calm.generation.at_once import pays_off, sample_at_once


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


@pytest.mark.parametrize("type", ["energy", "flow"])
def test_low_temperature_samples_a_patch_without_a_read(type):
    model, hidden = tiny.calm(type=type).to(PRETEND), torch.randn(4, 16).to(PRETEND)
    streams = RowStreams(torch.arange(4).to(PRETEND))
    assert pays_off(model, hidden, 50)
    with count() as counts:
        sample_at_once(model, hidden, 0.5, 50, streams)
    assert counts.host_reads == 0, counts.report()
    if type == "energy":
        assert counts.launches <= 140, counts.report()
        assert counts.uploads == 0, counts.report()


@pytest.mark.parametrize(("type", "arguments"), [("energy", {}), ("categorical_flow", {"temperature": 0.5})])
def test_a_sample_of_the_head_is_decoded_without_a_read(type, arguments):
    model, hidden = tiny.calm(type=type).to(PRETEND), torch.randn(4, 16).to(PRETEND)
    streams = RowStreams(torch.arange(4).to(PRETEND))
    with count() as counts, torch.no_grad():
        model.autoencoder.decode_tokens(model.head.sample(hidden, generator=streams, **arguments))
    assert (counts.host_reads, counts.uploads) == (0, 0), counts.report()


def test_a_row_of_a_batch_gets_what_it_gets_alone():
    model, hidden = tiny.calm(), torch.randn(4, 16)
    seeds = torch.tensor([3, 1, 4, 1])
    together = sample_at_once(model, hidden, 0.5, 30, RowStreams(seeds))
    alone = [sample_at_once(model, hidden[[row]], 0.5, 30, RowStreams(seeds[[row]])) for row in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert not pays_off(model, hidden, 30)  # on a CPU
