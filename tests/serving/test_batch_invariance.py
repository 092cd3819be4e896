"""Batch-invariant serving: the rounding of a sequence does not depend on the sequences beside it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONE
from test_engine import Collected, requests

from calm import CalmForCausalLM, TokenCodes, TokenCodesConfig
from calm.generation.model_runner import model_runner
from calm.generation.sampling_params import SamplingParams
from calm.serving.batch_invariance import BatchInvariance
from calm.serving.engine import Engine
from calm.serving.service import Limits, Service
from calm.serving.telemetry import Metrics, Telemetry


def categorical_flow(tokenizer, head):
    torch.manual_seed(2)
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    codes = TokenCodes(TokenCodesConfig(**tokens, patch_size=3, code_size=8))
    model = CalmForCausalLM.from_autoencoder(codes, BACKBONE | tokens, {"type": "categorical_flow", **head})
    for parameter in model.head.parameters():  # a new head gives all tokens the same probability
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("size", [1, 3, 15, 16, 40])
def test_batch_invariant_products_of_a_row_do_not_depend_on_the_number_of_rows(size):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((60, 300), (200, 300)))
    tables = torch.randn((60, 20, 300), generator=generator)
    for product in (lambda n: F.linear(x[:n], weight), lambda n: x[:n] @ weight.T,
                    lambda n: (tables[:n] @ x[:n, :, None])[..., 0]):  # fmt: skip
        with BatchInvariance():
            whole, part = product(60), product(size)
        assert torch.equal(whole[:size], part)
        torch.testing.assert_close(part, product(size), rtol=1e-4, atol=1e-4)
        assert whole.shape == product(60).shape


def test_batch_invariance_is_refused_where_attention_has_no_kernel_for_it(calm, baseline, tokenizer):
    limits = Limits(max_batch=2, max_queue=2, context=60, batch_invariant=True)
    model = type(baseline).from_pretrained(None, config=baseline.config, state_dict=baseline.state_dict(),
                                           attn_implementation="eager")  # fmt: skip
    with pytest.raises(
        ValueError, match="--batch-invariant needs the attention implementation sdpa, and b has 'eager'"
    ):
        Service("b", model, tokenizer, limits, Metrics())


@pytest.mark.parametrize("kind", ["calm", "token model", "categorical flow", "shortlist"])
def test_batch_invariant_conditions_are_those_of_a_sequence_alone_bit_for_bit(
    kind, calm, baseline, tokenizer, monkeypatch
):
    """Texts alone would hide most of the rounding: it decides where two tokens are as good as equal."""
    samplings = [SamplingParams(1.0), SamplingParams(0.5, "batch", 32), SamplingParams(0.5, "exact", 32)]
    model = calm
    if kind == "token model":
        model, samplings = baseline, [SamplingParams(1.0)]
    elif kind != "calm":
        head = {"shortlist_size": 16 if kind == "shortlist" else None}
        model = categorical_flow(tokenizer, head)
        samplings = [SamplingParams(1.0, "direct"), SamplingParams(0.0, "direct")]
    asked = [
        (prompt, count, samplings[index % len(samplings)], index)
        for index, (prompt, count, _, _) in enumerate(requests(tokenizer)[:18])
    ]

    def conditions(batch):
        """Conditions of every sample, by seed."""
        engine = Engine(model_runner(model), tokenizer, 8, 300, 64, Telemetry(Metrics(), "model"), batch_invariant=True)
        sampled = {}
        samplers = {name: getattr(engine.runner, name) for name in ("sample", "sample_in_rounds")}

        def record(name):
            def call(conditions, params, generators, *others):
                for row, generator in zip(conditions, generators, strict=True):
                    sampled.setdefault(generator.initial_seed(), []).append(row.clone())
                return samplers[name](conditions, params, generators, *others)

            return call

        for name in samplers:
            monkeypatch.setattr(engine.runner, name, record(name))
        jobs = [Collected(*request) for request in batch]
        engine.submit([job.job for job in jobs])
        texts = {job.job.params.seed: job.text() for job in jobs}
        engine.stop()
        return texts, sampled

    texts, together = conditions(asked)
    for request in asked:
        text, alone = conditions([request])
        seed = request[-1]
        assert text[seed] == texts[seed]
        assert len(alone[seed]) == len(together[seed]) > 1
        assert all(torch.equal(*pair) for pair in zip(alone[seed], together[seed], strict=True))
