"""One set of sampling parameters: checked once, the same for every caller."""

import dataclasses

import pytest
import tiny
import torch
from transformers import GenerationConfig

from calm import SamplingParams
from calm.generation.samplers import Sampler, register_sampler, sampler_names
from calm.generation.sampling_params import DEFAULTS, described_parameters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"temperature": float("inf")}, "temperature must be at least 0, got inf"),
        ({"temperature": "low"}, "temperature must be a number, got 'low'"),
        ({"temperature": 0, "sampler": "batch"}, r"temperature must be in \(0, 1\], got 0"),
        ({"temperature": 1.5, "sampler": "exact"}, r"temperature must be in \(0, 1\], got 1.5"),
        ({"temperature": 0.1, "sampler": "batch", "num_candidates": 5}, "num_candidates must be at least 10"),
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"num_candidates": True}, "num_candidates must be a whole number, got True"),
        ({"top_p": 1.5}, "top_p must be in 0 to 1, got 1.5"),
        ({"top_p": 0.9, "sampler": "exact"}, "top_p=0.9 needs token probabilities, and sampler exact only has samples"),
        ({"logprobs": 2, "sampler": "batch"}, "logprobs=2 needs token probabilities, .* use sampler direct or mtp"),
        ({"logprobs": 21}, "logprobs must be in 0 to 20, got 21"),
        ({"sampler": "nucleus"}, "sampler must be one of batch, exact, direct, mtp, got 'nucleus'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"stop": [""]}, "stop must be texts that are not empty"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_impossible_parameters_are_refused_where_they_are_made(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_arguments_precede_params_precede_saved_settings_precede_defaults():
    params = SamplingParams(temperature=0.5).with_defaults({"temperature": 0.25, "sampler": "exact", "top_p": None})
    assert dataclasses.asdict(params) == {
        **DEFAULTS, "temperature": 0.5, "sampler": "exact", "stop": (), "seed": None, "logprobs": None
    }  # fmt: skip
    model, ids = tiny.calm(token_prediction="independent"), tiny.tokens(1, 4)
    model.generation_config.update(eos_token_id=None, max_new_tokens=12, sampler="batch")
    with_params = SamplingParams(max_new_tokens=8, sampler="mtp", seed=3)
    assert model.generate(ids).shape == (1, 16)
    assert model.generate(ids, sampling_params=with_params).shape == (1, 12)
    assert model.generate(ids, sampling_params=with_params, max_new_tokens=4).shape == (1, 8)
    assert model.generate(ids, generation_config=GenerationConfig(max_new_tokens=5, eos_token_id=[])).shape == (1, 9)
    greedy = GenerationConfig(temperature=0.0, eos_token_id=[])  # of the sampler that the model has
    assert tiny.calm(type="categorical_flow").generate(ids, generation_config=greedy, max_new_tokens=4).shape == (1, 8)
    seeded = model.generate(ids, sampling_params=with_params)
    generator = [torch.Generator().manual_seed(3)]
    assert torch.equal(seeded, model.generate(ids, max_new_tokens=8, sampler="mtp", generator=generator))


def test_the_former_name_of_the_sampler_mtp_works_with_a_warning():
    with pytest.warns(FutureWarning, match="sampler 'token_prediction' is named 'mtp' now"):
        assert SamplingParams(sampler="token_prediction") == SamplingParams(sampler="mtp")
    model, ids = tiny.calm(token_prediction="independent"), tiny.tokens(1, 4)
    with pytest.warns(FutureWarning, match="named 'mtp'"):
        out = model.generate(ids, sampler="token_prediction", return_dict_in_generate=True, max_new_tokens=4)
    with pytest.warns(FutureWarning, match="num_drawn is named num_samples"):
        assert torch.equal(out.num_drawn, out.num_samples)
    model.generation_config.sampler = "token_prediction"  # saved by an earlier release: not the caller's doing
    model.generate(ids, max_new_tokens=4)


def test_a_new_model_samples_with_token_probabilities_where_it_has_them():
    samplers = [
        tiny.calm(**kind).generation_config.sampler
        for kind in ({}, {"token_prediction": "independent"}, {"type": "categorical_flow"})
    ]
    assert samplers == ["batch", "mtp", "direct"]


def test_parameters_are_checked_once_per_call_and_not_once_per_patch(monkeypatch):
    checks, check = [], Sampler.check
    monkeypatch.setattr(Sampler, "check", lambda self, params: checks.append(params) or check(self, params))
    model, ids, counts = tiny.calm(token_prediction="independent"), tiny.tokens(1, 4), []
    model.generation_config.eos_token_id = None
    for max_new_tokens in (4, 40):
        checks.clear()
        model.generate(ids, max_new_tokens=max_new_tokens, sampler="mtp", temperature=0.5)
        counts.append(len(checks))
    assert counts[0] == counts[1]


def test_a_described_parameter_reaches_command_line_and_server():
    from calm.cli.sampling_options import with_sampling_options
    from calm.serving.schemas import CompletionRequest

    names = list(described_parameters())
    assert names == ["temperature", "sampler", "num_candidates", "top_p"]
    command = with_sampling_options(lambda *, sampling: sampling)
    given = {"temperature": 0.5, "sampler": "mtp", "num_candidates": 7, "top_p": 0.5}
    assert command(**given) == SamplingParams(**given)
    assert CompletionRequest(**given, stop="x").sampling_params(9) == SamplingParams(
        **given, max_new_tokens=9, stop=("x",)
    )


def test_a_sampler_needs_a_name_of_its_own():
    with pytest.raises(ValueError, match="a sampler named mtp exists already"):
        register_sampler(type("Other", (Sampler,), {"name": "mtp"}))
    with pytest.raises(ValueError, match="needs a name of its own, got ''"):
        register_sampler(type("Nameless", (Sampler,), {}))
    assert sampler_names() == ["batch", "exact", "direct", "mtp"]
