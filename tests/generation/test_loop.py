import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from calm.data.tokenizer import train_tokenizer
from calm.functional import batch_temperature_sample
from calm.generation.samplers import SampledPatches
from calm.generation.sampling_params import SamplingParams

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


SAMPLINGS = [("batch", 1.0), ("batch", 0.5), ("batch", 0.7), ("exact", 0.7), ("mtp", 0.7)]


@pytest.mark.parametrize(("sampler", "temperature"), SAMPLINGS)
def test_a_seed_fixes_the_text_and_another_changes_it(sampler, temperature):
    model, ids = tiny.calm(1, token_prediction="autoregressive"), tiny.tokens(2, 6)
    model.generation_config.eos_token_id = None
    arguments = {"max_new_tokens": 8, "sampler": sampler, "temperature": temperature, "num_candidates": 30}
    first = model.generate(ids, generator=seeded(1), **arguments)
    torch.manual_seed(99)  # the global state plays no part
    assert torch.equal(first, model.generate(ids, generator=seeded(1), **arguments))
    assert not torch.equal(first, model.generate(ids, generator=seeded(2), **arguments))


def end_after(model, tokens):
    """Make a model emit fixed tokens."""
    patches = iter(torch.tensor(tokens).view(-1, 1, model.config.patch_size))
    model.sample_patch = lambda hidden, *_: SampledPatches.once(next(patches).expand(len(hidden), -1))


def test_nothing_follows_the_end_of_text_inside_its_chunk():
    model = tiny.calm()
    end_after(model, [5, 6, 7, 8, 9, tiny.EOS, 10, 11])
    out = model.generate(tiny.tokens(1, 4), max_new_tokens=100)
    assert out[0, 4:].tolist() == [5, 6, 7, 8, 9, tiny.EOS]


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


def test_stopping_criteria_are_asked_for_every_token():
    model, seen = tiny.calm(), []
    model.generation_config.eos_token_id = None

    def stop(ids, _):
        seen.append(ids.shape[1])
        return ids[:, -1] == 9

    end_after(model, [5, 6, 7, 8, 9, 10, 11, 12])
    out = model.generate(tiny.tokens(1, 4), max_new_tokens=40, stopping_criteria=StoppingCriteriaList([stop]))
    assert out[0, 4:].tolist() == [5, 6, 7, 8, 9]
    assert seen[:5] == [5, 6, 7, 8, 9]


def test_rows_end_alone_and_hold_padding_behind():
    model = tiny.calm()
    stop = StoppingCriteriaList([lambda ids, _: torch.tensor([ids.shape[1] >= 6, ids.shape[1] >= 9])])
    model.generation_config.eos_token_id = None
    out = model.generate(
        tiny.tokens(2, 4), max_new_tokens=40, stopping_criteria=stop, return_dict_in_generate=True, temperature=0.5
    )
    assert out.sequences.shape == (2, 9)
    assert (out.sequences[0, 6:] == tiny.PAD).all()
    assert out.num_samples.shape == (2, 2)
    assert out.num_samples[0, 1] == 0  # what has ended costs nothing
    assert out.num_samples[1, 1] > 0


def test_stop_strings_end_a_row_inside_a_chunk():
    tokenizer = train_tokenizer(["the cat sat on the mat. the dog did not."] * 5, 270)
    model = tiny.calm()
    model.config.autoencoder_config.vocab_size = 270
    ids = tokenizer("sat. the dog", add_special_tokens=False)["input_ids"]
    end_after(model, [*ids, *ids][: (2 * len(ids)) // 4 * 4])
    out = model.generate(tiny.tokens(1, 4), max_new_tokens=40, stop_strings=["at."], tokenizer=tokenizer)
    assert tokenizer.decode(out[0, 4:]) == "sat."
    with pytest.raises(ValueError, match="pass tokenizer="):
        model.generate(tiny.tokens(1, 4), stop_strings=["at."])


@pytest.mark.parametrize("padded", [False, True])
def test_several_sequences_of_a_prompt(padded):
    model, ids = tiny.calm(), tiny.tokens(2, 8)
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    out = model.generate(ids, mask, max_new_tokens=8, num_return_sequences=3, generator=seeded())
    assert out.shape == (6, 16)
    assert torch.equal(out[:, :8], ids.repeat_interleave(3, dim=0))
    assert len({tuple(row.tolist()) for row in out}) == 6
    wide = model.generate(
        ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), max_new_tokens=8, generator=seeded()
    )
    assert torch.equal(out, wide)


@pytest.mark.parametrize("type", ["energy", "flow", "diffusion"])
@pytest.mark.parametrize(("sampler", "temperature"), SAMPLINGS)
def test_rows_with_their_own_generators_equal_their_own_runs(type, sampler, temperature):
    model = tiny.calm(2, type, token_prediction="autoregressive")
    model.generation_config.eos_token_id = None
    prompts = [tiny.tokens(1, length) for length in (3, 8, 5)]
    batch = torch.cat([torch.nn.functional.pad(ids, (8 - ids.shape[1], 0), value=tiny.PAD) for ids in prompts])
    mask = torch.stack([(torch.arange(8) >= 8 - ids.shape[1]).long() for ids in prompts])
    arguments = {"max_new_tokens": 6, "temperature": temperature, "sampler": sampler, "num_candidates": 40}
    together = model.generate(batch, mask, generator=[seeded(row) for row in range(3)], **arguments)
    for row, ids in enumerate(prompts):
        alone = model.generate(ids, generator=[seeded(row)], **arguments)
        assert torch.equal(alone[0, ids.shape[1] :], together[row, 8:])
    with pytest.raises(ValueError, match="2 generators were given for 3 rows"):
        model.generate(batch, mask, generator=[seeded(0), seeded(1)], **arguments)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.5, 0.7, 1 / 3])
def test_decoding_as_needed_keeps_the_law(temperature):
    """Over several contexts, the patches of `sample_patch` and of deciding from all draws fully decoded: chi-square."""
    model = tiny.calm(2)
    torch.nn.init.normal_(model.head.output_layer.weight, std=0.15)  # some draws agree, some do not
    hidden = model(tiny.tokens(6, 6)).last_hidden_state[:, -1]
    rows = hidden.repeat_interleave(3000, 0)
    fast = model.sample_patch(rows, SamplingParams(temperature, "batch", 40), seeded(1))
    generator = seeded(2)
    latents = torch.cat([model.head.sample(rows, generator=generator, num_samples=10) for _ in range(4)])
    naive = batch_temperature_sample(model.autoencoder.decode_tokens(latents).movedim(0, 1), temperature, generator)
    assert fast.num_decoded.sum() < 0.95 * len(rows) * 80
    for context in range(6):
        one, other = (chunks.view(6, 3000, 2)[context] @ torch.tensor([100, 1]) for chunks in (fast.tokens, naive))
        known, index = torch.cat([one, other]).unique(return_inverse=True)
        counts = torch.stack([torch.bincount(half, minlength=len(known)) for half in index.view(2, 3000)]).double()
        often = counts.sum(0) >= 20
        statistic = ((counts[0] - counts[1]).square() / counts.sum(0))[often].sum()
        freedom = int(often.sum())
        assert freedom >= 2
        assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5, (context, freedom)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
def test_compiled_steps_change_nothing(tmp_path):
    model, ids = tiny.calm(), tiny.tokens(2, 12)
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for arguments in ({}, {"attention_mask": mask}):
        plain = model.generate(ids, max_new_tokens=14, generator=seeded(), **arguments)
        for _ in range(2):  # the second run reuses cache and code
            compiled = model.generate(ids, max_new_tokens=14, generator=seeded(), compile=True, **arguments)
            assert torch.equal(plain, compiled)
    copy.deepcopy(model).save_pretrained(tmp_path)  # the compiled step is no part of the model


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_texts_of_several_threads_are_their_own():
    model, ids = tiny.calm(), tiny.tokens(1, 12)
    model.generation_config.eos_token_id = None

    def text(seed):
        return model.generate(ids, max_new_tokens=40, generator=torch.Generator().manual_seed(seed), compile=True)

    alone = [text(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(text, range(4)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_padding_is_seen_without_a_mask():
    model, ids = tiny.calm(), tiny.tokens(2, 12)
    model.generation_config.eos_token_id = tiny.EOS
    ids[0, :5] = tiny.PAD
    seeds = lambda: [torch.Generator().manual_seed(seed) for seed in (0, 1)]  # noqa: E731
    with_mask = model.generate(ids, ids.ne(tiny.PAD).long(), max_new_tokens=8, generator=seeds())
    assert torch.equal(model.generate(ids, max_new_tokens=8, generator=seeds()), with_mask)
    with pytest.raises(ValueError, match=r"0 for padding on the left"):
        model.generate(ids.flip(1), max_new_tokens=8)
    # A token that also ends texts may stand in them.
    ids[0, :5] = tiny.EOS
    model.generation_config.pad_token_id = tiny.EOS
    whole = model.generate(ids, torch.ones_like(ids), max_new_tokens=8, generator=seeds())
    assert torch.equal(model.generate(ids, max_new_tokens=8, generator=seeds()), whole)


def test_token_prediction_may_be_flattened():
    model, ids = tiny.calm(token_prediction="autoregressive"), tiny.tokens(1, 8)
    out = model.generate(ids, max_new_tokens=8, temperature=1.5, sampler="mtp", eos_token_id=[])
    assert out.shape == (1, 16)
    with pytest.raises(ValueError, match=r"temperature must be at least 0"):
        model.generate(ids, temperature=float("inf"), sampler="mtp")


def test_transformers_streamers_work():
    tokenizer = train_tokenizer(["the cat sat on the mat. the dog did not."] * 5, 270)
    model, ids = tiny.calm(), tiny.tokens(1, 4)
    words = tokenizer("the cat sat on the mat", add_special_tokens=False)["input_ids"]
    words = words[: len(words) // 4 * 4]
    for streamer in (TextStreamer(tokenizer, skip_prompt=True), TextIteratorStreamer(tokenizer, skip_prompt=True)):
        end_after(model, words)
        model.extend = lambda state, _: state  # these words are not the model's
        model.generate(ids, max_new_tokens=len(words), streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(words)


def test_what_changes_nothing_is_accepted():
    model, ids = tiny.calm(), tiny.tokens(1, 4)
    out = model.generate(
        ids, max_length=9, do_sample=True, num_beams=1, top_p=1.0, top_k=None, use_cache=True, pad_token_id=3,
        eos_token_id=[tiny.EOS, 2], repetition_penalty=1.0, min_length=0, guidance_scale=1.0, disable_compile=True,
        early_stopping=False, trust_remote_code=False,
    )  # fmt: skip
    assert out.shape[1] <= 9
    end_after(model, [5, tiny.EOS, 7, 8])
    out = model.generate(ids, generation_config=GenerationConfig(max_length=11))
    assert out[0, 4:].tolist() == [5, tiny.EOS]  # the model's end, where a config has none of its own
    end_after(model, [5, 6, 7, 8])
    assert model.generate(ids, generation_config=GenerationConfig(max_length=7)).shape == (1, 7)


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


def test_what_callers_of_transformers_pass_is_understood():
    model, ids = tiny.calm(), tiny.tokens(2, 8)
    plain = model.generate(ids, max_new_tokens=8, generator=seeded())
    habits = {"use_cache": False, "logits_processor": [], "output_scores": False, "max_time": 3600.0}
    assert torch.equal(model.generate(inputs=ids, max_new_tokens=8, generator=seeded(), **habits), plain)
    at_once = model.generate(ids, max_new_tokens=8, generator=seeded(), max_time=1e-9)
    assert torch.equal(at_once, plain[:, :9])  # the first token ends it


def test_a_step_is_compiled_for_any_number_of_shapes(monkeypatch):
    """The compiler's limit is one of every cache, not of the process."""
    compiled, real = [], torch.compile

    def counting(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda step, **_: real(step, backend=counting, dynamic=False))
    model = tiny.calm()
    with torch._dynamo.config.patch(recompile_limit=2):
        for count in range(1, 5):
            before = len(compiled)
            model.generate(tiny.tokens(count, 8), max_new_tokens=12, compile=True)
            assert len(compiled) > before
        before = len(compiled)
        model.generate(tiny.tokens(1, 8), max_new_tokens=12, compile=True)
        assert len(compiled) == before  # it was compiled for that


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be in \(0, 1\], got 0.0"),
        ({"temperature": 1.5}, r"temperature must be in \(0, 1\], got 1.5"),
        ({"temperature": float("nan")}, r"temperature must be at least 0, got nan"),
        ({"temperature": 0.1, "num_candidates": 5}, r"num_candidates must be at least 10 at temperature 0.1 .*got 5"),
        ({"sampler": "nucleus"}, "sampler must be one of batch, exact, direct, mtp, got 'nucleus'"),
        ({"sampler": "mtp"}, r"this model was trained without it \(model.mtp_weight in its"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_time": 0}, r"max_time must be a number of seconds above 0, got 0"),
        ({"inputs": torch.ones(1, 4)}, r"inputs is another name of input_ids"),
        ({"tempreature": 0.5}, r"has no parameter tempreature; it has max_new_tokens, temperature"),
        ({"output_scores": True}, r"cannot follow output_scores=True: .* scores of single tokens do not apply"),
        (
            {"top_p": 0.9},
            "top_p=0.9 needs token probabilities, and sampler batch only has samples: use sampler direct or mtp",
        ),
        ({"do_sample": False}, r"cannot follow do_sample=False"),
        ({"num_beams": 4, "penalty_alpha": 0.6}, r"cannot follow num_beams=4, penalty_alpha=0.6"),
        ({"generation_config": GenerationConfig(top_k=50)}, r"cannot follow top_k=50 \(in its generation_config\)"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, got 1.5"),
        ({"temperature": "low"}, r"temperature must be a number, got 'low'"),
        ({"max_length": 8}, r"max_length \(8\) must be more than the prompt's 8 tokens"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1, got 0"),
        ({"max_new_tokens": 1000}, "need 251 patches of 4 tokens.*context has 64.*at most 252 new tokens"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.calm().generate(tiny.tokens(1, 8), **arguments)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (torch.empty((0, 4), dtype=torch.long), r"at least one row, got \(0, 4\)"),
        (torch.tensor([3, 4]), r"must be a tensor \[batch, tokens\] of at least one row, got \(2,\)"),
        ([[3, 4]], r"must be a tensor .* got list"),
        (torch.tensor([[3.0, 4.0]]), "must be whole numbers .*got torch.float32"),
    ],
)
def test_what_is_no_batch_of_tokens_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        tiny.calm().generate(prompts)


def test_unknown_tokens_are_refused():
    with pytest.raises(ValueError, match=r"must be in 0 to 47.*got 3 to 60"):
        tiny.calm().generate(torch.tensor([[3, 60]]))


def test_masks_with_holes_are_refused():
    with pytest.raises(ValueError, match="0 for padding on the left"):
        tiny.calm().generate(tiny.tokens(1, 4), torch.tensor([[1, 0, 1, 1]]))
