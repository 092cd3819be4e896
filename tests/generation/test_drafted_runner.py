"""Prompts and files of prompts with a drafter, as `calm generate --drafter` continues them."""

import json

import pytest
import torch
from drafting_models import make_drafter, make_target

from calm.data.tokenizer import train_tokenizer
from calm.generation.completions import complete, complete_file
from calm.generation.drafted_runner import DraftedRunner
from calm.generation.sampling_params import SamplingParams

PROMPTS = ["the quick brown", "", "dog", "a lazy fox jumps"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 20, 290)


@pytest.fixture(scope="module")
def target(tokenizer):
    return make_target(vocab_size=len(tokenizer), end=tokenizer.eos_token_id, scale=2.0)


@pytest.fixture
def runner(target, tmp_path):
    make_drafter(target, "mtp", shortlist=200).save_pretrained(tmp_path / "drafter")
    return DraftedRunner(target, tmp_path / "drafter")


def test_greedy_texts_and_their_stop_texts_are_those_without_a_drafter(target, tokenizer, runner):
    plain = complete(target, tokenizer, PROMPTS, SamplingParams(0.0, max_new_tokens=40))
    stops = (plain[0]["text"][7:9], plain[3]["text"][12:14])
    for params in (
        SamplingParams(0.0, max_new_tokens=40),
        SamplingParams(0.0, max_new_tokens=40, stop=stops),
        SamplingParams(0.0, max_new_tokens=7, top_p=0.5),
    ):
        expected = complete(target, tokenizer, PROMPTS, params)
        found = complete(runner, tokenizer, PROMPTS, params)
        assert [result["text"] for result in found] == [result["text"] for result in expected]
    assert runner.statistics.num_drafted > 0


def test_the_texts_of_a_file_do_not_depend_on_the_batch(tokenizer, runner, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    params = SamplingParams(0.8, max_new_tokens=20, seed=5, stop="fo")
    files = []
    for size in (1, 3):
        complete_file(runner, tokenizer, source, tmp_path / f"{size}.jsonl", params, size)
        lines = (tmp_path / f"{size}.jsonl").read_text(encoding="utf-8").splitlines()
        files.append([json.loads(line) | {"tokens_per_second": 0} for line in lines])
    assert files[0] == files[1]
    assert files[0][2]["settings"]["seed"] == 7
    assert files[0][0]["settings"]["drafter"] == runner.path
    assert len({line["text"] for line in files[0]}) == 4


def test_top_p_leaves_the_unlikely_tokens_out(target, tokenizer, runner):
    params = SamplingParams(1.0, max_new_tokens=20, top_p=0.3)
    ids = tokenizer("the quick")["input_ids"]
    new = runner.generate(torch.tensor([ids] * 8), torch.ones(8, len(ids), dtype=torch.long), params, tokenizer).tokens
    assert len(set(map(tuple, new.tolist()))) > 1
    for row in new.tolist():
        logits = target(torch.tensor([ids + row])).logits[0, len(ids) - 1 : -1].detach()
        probs, order = logits.softmax(-1).sort(descending=True)
        before = probs.cumsum(-1) - probs
        place = (order == torch.tensor(row)[:, None]).long().argmax(-1)
        is_text = torch.tensor(row).ne(tokenizer.eos_token_id).cumprod(0).bool()
        assert bool((before.gather(1, place[:, None])[:, 0] < 0.3)[is_text].all())


def test_what_has_no_meaning_with_a_drafter_is_refused(target, tokenizer, runner):
    for params, match in (
        (SamplingParams(1.0, "mtp"), "sampler and num_candidates are settings of a CALM"),
        (SamplingParams(0.0, max_new_tokens=2048), "do not fit the model's context"),
    ):
        with pytest.raises(ValueError, match=match):
            complete(runner, tokenizer, PROMPTS, params)
    with pytest.raises(ValueError, match="compile has no effect"):
        complete(runner, tokenizer, PROMPTS, SamplingParams(0.0), compile=True)
