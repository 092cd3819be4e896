"""A token model served with a drafter: texts are those that it gives alone, and those of the model."""

import pytest
import torch
from drafting_models import make_drafter, make_target
from test_engine import Collected, ids_of, out_of_memory_beyond

from calm.generation.drafting import generate_with_drafter
from calm.generation.model_runner import model_runner
from calm.generation.sampling_params import SamplingParams
from calm.models.drafters import DRAFTERS
from calm.serving.drafted_engine import DraftedEngine
from calm.serving.service import Limits, Service
from calm.serving.telemetry import Metrics, Telemetry

PROMPTS = ["the quick brown", "", "über größere Öfen", "a", "lazy dogs and foxes jump over the quick brown"]


@pytest.fixture(scope="module")
def target(tokenizer):
    return make_target(vocab_size=len(tokenizer), end=tokenizer.eos_token_id, scale=2.0)


@pytest.fixture
def engine_of(tokenizer, target):
    engines = []

    def make(drafter_type="mtp", max_batch=4, context=200):
        drafter = make_drafter(target, drafter_type, shortlist=200)
        telemetry = Telemetry(Metrics(), "model")
        engines.append(DraftedEngine(drafter, model_runner(target), tokenizer, max_batch, context, 64, telemetry))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()


@pytest.mark.parametrize("drafter_type", sorted(DRAFTERS))
def test_every_sequence_gets_what_it_gets_alone(tokenizer, target, engine_of, drafter_type):
    """12 sequences of three kinds through 4 slots: they join and leave at different steps."""
    engine = engine_of(drafter_type)
    settings = [SamplingParams(1.0, "direct"), SamplingParams(0.0, "direct"), SamplingParams(0.6, "direct")]
    requests = [
        (ids_of(tokenizer, PROMPTS[index % 5]), 4 + 9 * (index % 4), settings[index % 3], 50 + index)
        for index in range(12)
    ]
    jobs = [Collected(*request) for request in requests]
    engine.submit([each.job for each in jobs])
    for (prompt, max_tokens, sampling, seed), collected in zip(requests, jobs, strict=True):
        ids = torch.tensor([prompt or [tokenizer.eos_token_id]])
        alone = generate_with_drafter(
            target, engine.drafter, ids, max_new_tokens=max_tokens, temperature=sampling.temperature,
            generator=[torch.Generator().manual_seed(seed)],
        )  # fmt: skip
        expected = alone.sequences[0, ids.shape[1] :].tolist()
        assert collected.text() == tokenizer.decode(expected, skip_special_tokens=True)
        if sampling.temperature == 0:
            plain = target.generate(ids, max_new_tokens=max_tokens, do_sample=False)[0, ids.shape[1] :].tolist()
            assert expected[: len(plain)] == plain


def test_log_probabilities_are_those_of_the_model(tokenizer, target, engine_of):
    engine = engine_of()
    engine.runner.end_ids = set()
    prompt = ids_of(tokenizer, "the quick")
    collected = Collected(prompt, 20, SamplingParams(1.0, "direct", logprobs=2), 3)
    engine.submit([collected.job])
    found = [logprob for chunk in collected.chunks() for logprob in chunk.logprobs]
    ids = torch.tensor([[*prompt, *(each.token for each in found)]])
    expected = target(ids).logits[0].detach().log_softmax(-1)
    assert len(found) == 20
    for position, each in enumerate(found, start=len(prompt) - 1):
        assert each.logprob == pytest.approx(float(expected[position, each.token]), abs=1e-4)
        assert [token for token, _ in each.top] == expected[position].topk(2).indices.tolist()


def test_stop_strings_the_end_of_the_context_and_the_counts(tokenizer, engine_of):
    engine = engine_of(context=40)
    engine.runner.end_ids = set()
    prompt = ids_of(tokenizer, "a")
    full = Collected(
        prompt, 40 + 1 - len(prompt), SamplingParams(0.0, "direct"), 0
    )  # the last draft is past the context
    engine.check(full.job)
    engine.submit([full.job])
    text = full.text()
    assert full.job.num_tokens == 41 - len(prompt)
    stopped = Collected(prompt, 30, SamplingParams(0.0, "direct"), 0, stop=[text[10:13]])
    engine.submit([stopped.job])
    assert stopped.text() == text[: text.index(text[10:13])]
    assert stopped.job.num_tokens < 30
    counts = {
        (sample.name, sample.labels.get("result")): sample.value
        for metric in engine.telemetry._metrics.registry.collect()
        for sample in metric.samples
    }
    accepted, wasted = (counts["calm_drafted_tokens_total", result] for result in ("accepted", "wasted"))
    passes = counts["calm_tokens_per_verification_count", None]
    assert accepted + wasted == 4 * passes
    assert counts["calm_tokens_per_verification_sum", None] == passes + accepted


def test_where_memory_does_not_suffice_the_newest_texts_end(tokenizer, target, engine_of, caplog):
    engine = engine_of()
    engine.runner.end_ids = set()
    prompt = ids_of(tokenizer, "fox")
    expected = [Collected(prompt, 30, SamplingParams(1.0, "direct"), seed) for seed in range(2)]
    engine.submit([each.job for each in expected])
    texts = [each.text() for each in expected]
    read = engine._read_drafts
    engine._read_drafts = out_of_memory_beyond(2, read, lambda arguments: len(arguments[0]))
    jobs = [Collected(prompt, 30, SamplingParams(1.0, "direct"), seed) for seed in range(4)]
    engine.submit([each.job for each in jobs])
    assert [each.text() for each in jobs[:2]] == texts
    assert [each.chunks()[-1].finish_reason for each in jobs[2:]] == ["error", "error"]
    assert "no memory for a step of 4 sequences: the newest one ends" in caplog.text


def test_wrong_use_is_refused_in_one_line(target, calm, baseline, tokenizer):
    drafter = make_drafter(target, "mtp")
    for model, limits, match in (
        (calm, Limits(), "give a token model as target"),
        (baseline, Limits(), "trained for another target"),
        (target, Limits(batch_invariant=True), "--batch-invariant and --drafter exclude each other"),
    ):
        with pytest.raises(ValueError, match=match):
            Service("model", model, tokenizer, limits, Metrics(), drafter)
