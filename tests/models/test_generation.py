import pytest
import tiny
import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

PATCH_SIZES = [1, 2, 3, 4, 8]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_cached_equals_uncached(patch_size):
    model = tiny.calm(patch_size)
    ids = tiny.tokens(2, 3 * patch_size)
    state = model.prefill(*model.align_prompt(ids))
    for _ in range(3):
        chunk = tiny.tokens(2, patch_size)
        ids = torch.cat([ids, chunk], dim=1)
        state = model.extend(state, chunk)
        torch.testing.assert_close(state.hidden, model(ids).last_hidden_state[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
@pytest.mark.parametrize("length", [1, 5, 7, 8])
def test_prompts_of_any_length_stand_unbroken_in_front_of_the_continuation(patch_size, length):
    model, ids = tiny.calm(patch_size), tiny.tokens(2, length)
    model.generation_config.eos_token_id = None
    out = model.generate(ids, max_new_tokens=7, generator=seeded())
    assert out.shape == (2, length + 7)
    assert torch.equal(out[:, :length], ids)
    aligned, patch_mask = model.align_prompt(ids)
    assert aligned.shape[1] % patch_size == 0
    assert torch.equal(aligned[:, -length:], ids)
    assert (aligned[:, :-length] == tiny.EOS).all()  # separators, not padding, in front
    assert patch_mask.all()


def test_left_padded_rows_equal_their_own_runs():
    model = tiny.calm()
    model.generation_config.eos_token_id = None
    prompts = [tiny.tokens(1, length) for length in (3, 8, 13)]
    batch = torch.cat([torch.nn.functional.pad(ids, (13 - ids.shape[1], 0), value=tiny.PAD) for ids in prompts])
    mask = torch.stack([(torch.arange(13) >= 13 - ids.shape[1]).long() for ids in prompts])
    together = model.prefill(*model.align_prompt(batch, mask))
    for row, ids in enumerate(prompts):
        alone = model.prefill(*model.align_prompt(ids))
        torch.testing.assert_close(together.hidden[row], alone.hidden[0], rtol=1e-4, atol=1e-5)
    chunk = tiny.tokens(3, 4)
    together = model.extend(together, chunk)
    for row, ids in enumerate(prompts):
        alone = model.extend(model.prefill(*model.align_prompt(ids)), chunk[row : row + 1])
        torch.testing.assert_close(together.hidden[row], alone.hidden[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sampler", "temperature"), [("batch", 1.0), ("batch", 0.5), ("batch", 0.7), ("exact", 0.7)])
def test_a_seed_fixes_the_text_and_another_changes_it(sampler, temperature):
    model, ids = tiny.calm(1), tiny.tokens(2, 6)
    model.generation_config.eos_token_id = None
    arguments = {"max_new_tokens": 8, "sampler": sampler, "temperature": temperature, "num_candidates": 30}
    first = model.generate(ids, generator=seeded(1), **arguments)
    torch.manual_seed(99)  # the global state plays no part
    assert torch.equal(first, model.generate(ids, generator=seeded(1), **arguments))
    assert not torch.equal(first, model.generate(ids, generator=seeded(2), **arguments))


def end_after(model, tokens):
    """Make a model emit fixed tokens."""
    chunks = iter(torch.tensor(tokens).view(-1, 1, model.config.patch_size))
    model.next_chunk = lambda hidden, *_: next(chunks).expand(len(hidden), -1)


def test_nothing_follows_the_end_of_text_inside_its_chunk():
    model = tiny.calm()
    end_after(model, [5, 6, 7, 8, 9, tiny.EOS, 10, 11])
    out = model.generate(tiny.tokens(1, 4), max_new_tokens=100)
    assert out[0, 4:].tolist() == [5, 6, 7, 8, 9, tiny.EOS, tiny.PAD, tiny.PAD]


def test_the_limit_need_not_be_a_multiple_of_the_patch():
    model = tiny.calm()
    end_after(model, [5, 6, 7, 8, 9, 10, 11, 12])
    assert model.generate(tiny.tokens(1, 4), max_new_tokens=6)[0, 4:].tolist() == [5, 6, 7, 8, 9, 10]


class Recorder(BaseStreamer):
    def __init__(self):
        self.calls, self.ended = [], False

    def put(self, value):
        self.calls.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer_gets_the_prompt_then_every_chunk():
    model, recorder = tiny.calm(), Recorder()
    end_after(model, [5, 6, 7, 8, 9, tiny.EOS, 10, 11])
    ids = tiny.tokens(1, 5)
    model.generate(ids, max_new_tokens=100, streamer=recorder)
    assert recorder.calls == [ids[0].tolist(), [5, 6, 7, 8], [9, tiny.EOS]]
    assert recorder.ended


def test_stopping_criteria_are_asked_after_every_chunk():
    model = tiny.calm()
    model.generation_config.eos_token_id = None
    stop = StoppingCriteriaList([lambda ids, _: torch.tensor([ids.shape[1] >= 12])])
    assert model.generate(tiny.tokens(1, 4), max_new_tokens=40, stopping_criteria=stop).shape[1] == 12


def test_an_empty_prompt_starts_a_document():
    model = tiny.calm()
    model.generation_config.eos_token_id = None
    assert model.generate(max_new_tokens=5).shape == (1, 5)


def test_generation_settings_travel_with_the_model(tmp_path):
    model = tiny.calm()
    model.generation_config.update(temperature=0.5, num_candidates=7, sampler="exact")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).generation_config
    assert (loaded.temperature, loaded.num_candidates, loaded.sampler) == (0.5, 7, "exact")


def test_exact_sampler_hands_over_to_the_batch_sampler_with_a_warning():
    model = tiny.calm(8)  # chunks of 8 random tokens never agree
    torch.nn.init.normal_(model.head.output_layer.weight, std=5)
    with pytest.warns(UserWarning, match="agree too rarely for exact sampling at temperature 0.2"):
        model.generate(tiny.tokens(1, 8), max_new_tokens=8, temperature=0.2, sampler="exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"temperature must lie in \(0, 1\], got 0.0"),
        ({"temperature": 1.5}, r"temperature must lie in \(0, 1\], got 1.5"),
        ({"temperature": float("nan")}, r"temperature must lie in \(0, 1\], got nan"),
        ({"temperature": 0.1, "num_candidates": 5}, "num_candidates must be at least 1/temperature = 10, got 5"),
        ({"sampler": "nucleus"}, "sampler must be one of batch, exact, got 'nucleus'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"top_p": 0.9}, "does not take 'top_p'.*no use for top_p"),
        ({"max_new_tokens": 1000}, "need 251 patches of 4 tokens.*context holds 64.*at most 252 new tokens"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.calm().generate(tiny.tokens(1, 8), **arguments)


def test_unknown_tokens_are_refused():
    with pytest.raises(ValueError, match=r"must lie in 0 to 47.*got 3 to 60"):
        tiny.calm().generate(torch.tensor([[3, 60]]))


def test_masks_with_holes_are_refused():
    with pytest.raises(ValueError, match="0 for padding on the left"):
        tiny.calm().generate(tiny.tokens(1, 4), torch.tensor([[1, 0, 1, 1]]))
