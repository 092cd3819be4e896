"""A patch of generation waits for the device once."""

import pytest
import tiny
import torch
from counting.instrument import PRETEND, count

from calm.functional.rng import RowStreams


@pytest.mark.parametrize(
    ("type", "arguments"),
    [
        ("energy", {"temperature": 1.0}),
        ("energy", {"temperature": 0.5, "sampler": "batch", "num_candidates": 50}),
        ("categorical_flow", {"temperature": 1.0, "sampler": "direct"}),
    ],
)
def test_a_patch_reads_the_device_once(type, arguments):
    model, ids = tiny.calm(type=type), tiny.tokens(3, 16)
    model.generation_config.eos_token_id = None
    model.to(PRETEND)
    found = []
    for patches in (3, 6):
        streams = RowStreams(torch.arange(3).to(PRETEND))
        with count() as counts:
            model.generate(ids, max_new_tokens=4 * patches, generator=streams, **arguments)
        found.append(counts)
    few, many = found
    assert many.host_reads - few.host_reads == 3, many.report()
    assert many.uploads == few.uploads, many.report()
