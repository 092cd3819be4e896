"""A training micro-batch never waits for the device."""

import pytest
import tiny
from counting.instrument import PRETEND, count

from calm.compat.masking import no_packed_sequences


@pytest.mark.parametrize("type", ["energy", "diffusion", "flow", "categorical_flow"])
def test_a_micro_batch_reads_nothing_back(type):
    model = tiny.calm(type=type, token_prediction="autoregressive").train().to(PRETEND)
    ids = tiny.tokens(2, 16).to(PRETEND)
    with count() as counts, no_packed_sequences():
        model(input_ids=ids, labels=ids).loss.backward()
    assert counts.host_reads == 0, counts.report()


def test_a_micro_batch_of_the_autoencoder_reads_nothing_back():
    model = tiny.autoencoder().train().to(PRETEND)
    ids = tiny.tokens(2, 16).to(PRETEND)
    with count() as counts:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counts.host_reads == 0, counts.report()
