"""Where a continuation ends, and where a file of them is written."""

import codecs

import pytest
import tiny
from filelock import FileLock

from calm.data.tokenizer import train_tokenizer
from calm.generation.completions import complete_file, until_end
from calm.generation.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four five six seven"] * 9, 270)


def test_a_text_ends_at_the_tokenizers_end_and_loses_its_padding(tokenizer):
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert end != pad
    assert until_end([5, 6, end, 7, end], tokenizer) == [5, 6]
    assert until_end([5, pad, 6, pad, pad], tokenizer) == [5, pad, 6]


@pytest.mark.parametrize("known", [9, [8, 9]])
def test_a_text_ends_at_any_end_the_model_knows(tokenizer, known):
    """One that was fine-tuned behind a begin-of-text token ends with that, and is padded with it."""
    model = tiny.calm()
    model.generation_config.eos_token_id = known
    assert until_end([5, 6, 9, 9, 9], tokenizer, model) == [5, 6]
    assert until_end([5, 6, tokenizer.eos_token_id, 9], tokenizer, model) == [5, 6]


def test_two_runs_do_not_write_one_file(tmp_path, tokenizer):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    source.write_bytes(codecs.BOM_UTF8 + b'{"prompt": "a"}\n')
    model = tiny.calm(vocab_size=len(tokenizer))
    params = SamplingParams(max_new_tokens=4)
    with FileLock(tmp_path / ".texts.jsonl.lock"), pytest.raises(ValueError, match="another process is writing"):
        complete_file(model, tokenizer, source, output, params)
    assert complete_file(model, tokenizer, source, output, params) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "texts.jsonl"]


def test_settings_that_the_model_cannot_follow_are_refused_before_a_file_is_written(tmp_path, tokenizer):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out" / "texts.jsonl"
    source.write_text('{"prompt": "a"}\n')
    model = tiny.calm(vocab_size=len(tokenizer))
    for params, message in (
        (SamplingParams(temperature=0), r"temperature must be in \(0, 1\], got 0"),  # its own sampler is batch
        (SamplingParams(sampler="mtp"), "sampler mtp needs multi-token prediction"),
        (SamplingParams(max_new_tokens=4000), "line 1: a prompt of 1 tokens and max_new_tokens=4000 do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            complete_file(model, tokenizer, source, output, params)
    assert not output.parent.exists()
