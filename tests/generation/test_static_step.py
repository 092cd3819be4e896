"""Recorded steps: a stand-in for a CUDA graph that calls the step as a capture does, and then replays it."""

import threading

import pytest
import tiny
import torch

from calm.generation import static_step


@pytest.fixture
def captures(monkeypatch):
    """Count captures. A capture calls the function three times, twice for real; a replay returns the same tensor."""
    made = []

    def capture(function):
        made.append(threading.current_thread())
        for _ in range(2):
            function()
        output = torch.empty(0)

        def replay():
            return output.set_(function())

        return replay

    monkeypatch.setattr(static_step, "capture_for", lambda _: capture)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return made


def test_recorded_steps_change_nothing(captures):
    model, ids = tiny.calm(), tiny.tokens(2, 12)
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for arguments in ({}, {"attention_mask": mask}, {}):
        for seed in range(2):
            generate = [
                model.generate(
                    ids, max_new_tokens=14, generator=torch.Generator().manual_seed(seed), compile=compile, **arguments
                )
                for compile in (False, True)
            ]
            assert torch.equal(*generate)
    assert len(captures) == 3  # without a mask, with one, without


def test_a_step_that_one_thread_recorded_runs_in_another(captures):
    model, ids = tiny.calm(), tiny.tokens(1, 12)
    texts = []

    def generate():
        texts.append(model.generate(ids, max_new_tokens=12, generator=torch.Generator().manual_seed(0), compile=True))

    generate()
    thread = threading.Thread(target=generate)
    thread.start()
    thread.join()
    assert len(captures) == 1
    assert torch.equal(*texts)
