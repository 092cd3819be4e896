"""Continuous batching: what a sequence gets does not depend on what runs beside it."""

import dataclasses
import queue

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerFast

from calm.generation.model_runner import model_runner
from calm.generation.sampling_params import SamplingParams
from calm.serving.engine import Engine, QueueFullError
from calm.serving.jobs import Job
from calm.serving.telemetry import Metrics, Telemetry
from calm.serving.text import TextStream


class Collected:
    """A job and what it emitted."""

    def __init__(self, prompt, max_tokens, sampling, seed, stop=()):
        self.events = queue.Queue()
        params = dataclasses.replace(sampling, max_new_tokens=max_tokens, seed=seed, stop=tuple(stop))
        self.job = Job(prompt, params.with_defaults(), self.events.put)

    def chunks(self):
        chunks = []
        while not (chunks and chunks[-1].finish_reason):
            chunks.append(self.events.get(timeout=60))
        return chunks

    def text(self):
        return "".join(chunk.text for chunk in self.chunks())


@pytest.fixture
def engine_of(tokenizer):
    engines = []

    def make(model, max_batch=4, context=300, max_queue=64):
        telemetry = Telemetry(Metrics(), "model")
        engines.append(Engine(model_runner(model), tokenizer, max_batch, context, max_queue, telemetry))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()


def ids_of(tokenizer, text):
    return tokenizer(text)["input_ids"]


def requests(tokenizer):
    settings = [
        SamplingParams(1.0), SamplingParams(0.5, "batch", 32), SamplingParams(0.7, "batch", 16),
        SamplingParams(0.7, "mtp"), SamplingParams(0.5, "exact", 32),
    ]  # fmt: skip
    prompts = ["the quick", "", "über größere Öfen", "a", "lazy dogs and foxes jump over the quick brown"]
    return [
        (ids_of(tokenizer, prompts[i % 5]), 5 + 7 * (i % 4), settings[i % 4 if i % 7 else 4], 100 + i)
        for i in range(24)
    ]


def test_every_sequence_gets_what_generate_gives_it_alone(calm, tokenizer, engine_of):
    """24 sequences of five kinds through 4 slots: they join and leave at different steps."""
    asked = requests(tokenizer)
    jobs = [Collected(*request) for request in asked]
    engine = engine_of(calm)
    engine.submit([each.job for each in jobs])
    for (prompt, max_tokens, sampling, seed), collected in zip(asked, jobs, strict=True):
        out = calm.generate(
            torch.tensor([prompt], dtype=torch.long),
            max_new_tokens=max_tokens,
            temperature=sampling.temperature,
            sampler=sampling.sampler,
            num_candidates=sampling.num_candidates,
            generator=[torch.Generator().manual_seed(seed)],
        )
        expected = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        chunks = collected.chunks()
        assert "".join(chunk.text for chunk in chunks) == expected
        assert all(chunk.num_tokens <= 3 for chunk in chunks)
        assert {chunk.finish_reason for chunk in chunks[:-1]} <= {None}


def test_a_token_model_is_served_in_the_same_way(baseline, tokenizer, engine_of):
    asked = [(ids_of(tokenizer, "the quick brown"), 20, SamplingParams(temperature, "direct"), seed)
             for seed, temperature in enumerate([1.0, 0.7, 1.3] * 4)]  # fmt: skip
    jobs = [Collected(*request) for request in asked]
    engine_of(baseline).submit([each.job for each in jobs])
    for (prompt, max_tokens, sampling, seed), collected in zip(asked, jobs, strict=True):
        generator, ids = torch.Generator().manual_seed(seed), list(prompt)
        while len(ids) < len(prompt) + max_tokens:
            logits = baseline(torch.tensor([ids])).logits[0, -1] / sampling.temperature
            below = logits.softmax(-1).cumsum(-1)  # one random number a token
            ids.append(int((below <= torch.rand(1, generator=generator) * below[-1]).sum()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert collected.text() == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_the_lowest_temperature_takes_the_likeliest_token_and_ends_nobody_elses_text(baseline, tokenizer, engine_of):
    ids = ids_of(tokenizer, "the quick brown")
    cold, warm = Collected(ids, 8, SamplingParams(1e-40, "direct"), 0), Collected(ids, 30, SamplingParams(1.0), 1)
    engine_of(baseline).submit([warm.job, cold.job])
    text = list(ids)
    for _ in range(8):
        text.append(int(baseline(torch.tensor([text])).logits[0, -1].argmax()))
        if text[-1] == tokenizer.eos_token_id:
            break
    assert cold.text() == tokenizer.decode(text[len(ids) :], skip_special_tokens=True)
    assert warm.chunks()[-1].finish_reason in ("length", "stop")


def test_cancelled_sequences_give_up_their_slots(calm, tokenizer, engine_of):
    engine = engine_of(calm, max_batch=2)
    engine.runner.end_ids = set()  # so that texts have their full length
    long = [Collected(ids_of(tokenizer, "fox"), 250, SamplingParams(), seed) for seed in range(2)]
    engine.submit([each.job for each in long])
    short = Collected(ids_of(tokenizer, "fox"), 6, SamplingParams(), 7)
    engine.submit([short.job])
    long[0].events.get(timeout=60)
    long[0].job.cancel()
    waiting = Collected([], 6, SamplingParams(), 7)
    assert short.chunks()[-1].finish_reason == "length"  # before the other long one, which still runs
    assert long[1].job.num_tokens < 250
    assert long[0].chunks()[-1].finish_reason == "cancelled"
    engine.submit([waiting.job])
    waiting.job.cancel()
    assert waiting.chunks()[-1].finish_reason in ("cancelled", "length")
    assert long[1].chunks()[-1].finish_reason == "length"


def test_stop_strings_and_the_end_of_text_end_a_sequence(calm, tokenizer, engine_of):
    engine = engine_of(calm)
    engine.runner.end_ids = set()
    prompt = ids_of(tokenizer, "the quick")
    plain = Collected(prompt, 60, SamplingParams(), 3)
    engine.submit([plain.job])
    text = plain.text()
    stop = text[10:13]
    stopped = Collected(prompt, 60, SamplingParams(), 3, [stop, "never in it"])
    engine.submit([stopped.job])
    chunks = stopped.chunks()
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].finish_reason == "stop"


def test_what_cannot_be_done_is_refused_before_it_waits(calm, tokenizer, engine_of):
    engine = engine_of(calm, context=30, max_queue=2)
    with pytest.raises(ValueError, match=r"prompt \(2 tokens\) and max_tokens \(50\) exceed the context of 30 tokens"):
        engine.check(Collected([1, 2], 50, SamplingParams(), 0).job)
    # What is offered can be had, and no token more.
    for prompt in ([1, 2], [1, 2, 3], [1] * 29):
        with pytest.raises(ValueError, match="request at most") as refused:
            engine.check(Collected(prompt, 50, SamplingParams(), 0).job)
        room = int(str(refused.value).rsplit(" ", 2)[-2])
        engine.check(Collected(prompt, room, SamplingParams(), 0).job)
        with pytest.raises(ValueError, match=f"at most {room} tokens"):
            engine.check(Collected(prompt, room + 1, SamplingParams(), 0).job)
    with pytest.raises(ValueError, match=r"context of 30 tokens: shorten the prompt\.$"):
        engine.check(Collected([1] * 40, 1, SamplingParams(), 0).job)
    with pytest.raises(ValueError, match="token ids outside 0 to 299"):
        engine.check(Collected([300], 5, SamplingParams(), 0).job)
    with pytest.raises(QueueFullError):
        engine.submit([Collected([], 5, SamplingParams(), 0).job for _ in range(4 + 2 + 1)])
    engine.stop()
    with pytest.raises(QueueFullError, match="shutting down"):
        engine.submit([Collected([], 5, SamplingParams(), 0).job])


class HostReads(TorchFunctionMode):
    """Counts what has to wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        reads = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero", "numpy")
        self.count += getattr(function, "__name__", "") in reads
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.7, "mtp")])
def test_a_step_reads_the_device_once(calm, tokenizer, engine_of, sampling):
    engine, counts = engine_of(calm), []
    engine.runner.end_ids = set()
    step = engine._step

    def counted():
        with HostReads() as reads:
            step()
        counts.append(reads.count)

    engine._step = counted
    jobs = [Collected(ids_of(tokenizer, "fox"), 9 + 3 * i, sampling, i) for i in range(4)]
    engine.submit([each.job for each in jobs])
    for each in jobs:
        each.chunks()
    assert set(counts) == {1}


def test_prompts_are_read_together(calm, baseline, tokenizer, engine_of):
    """Prompts of different lengths, all of them waiting when the engine looks: one pass of the model."""
    for model in (calm, baseline):
        engine, sizes = engine_of(model), []
        prefill = engine.runner.prefill
        engine.runner.prefill = lambda prompts, sizes=sizes, prefill=prefill: (
            sizes.append(len(prompts)) or prefill(prompts)
        )
        jobs = [
            Collected(ids_of(tokenizer, "the quick brown fox"[: 4 * i]), 6, SamplingParams(), i) for i in range(1, 5)
        ]
        engine.submit([each.job for each in jobs])
        for each in jobs:
            assert each.chunks()[-1].finish_reason in ("length", "stop")
        assert sizes == [4]


def out_of_memory_beyond(most, function, size):
    """A function that runs out of memory where it is asked for more than ``most`` sequences."""

    def bounded(*arguments):
        out = function(*arguments)  # after it has taken its random numbers
        if size(arguments) > most:
            raise torch.OutOfMemoryError("no memory left")
        return out

    return bounded


def test_where_memory_does_not_suffice_for_all_the_texts_are_drawn_in_parts(calm, tokenizer, engine_of):
    asked = [(ids_of(tokenizer, "the quick"), 12, SamplingParams(0.5, "batch", 16), seed) for seed in range(4)]
    expected = [Collected(*request) for request in asked]
    engine_of(calm).submit([each.job for each in expected])
    engine = engine_of(calm)
    engine.runner.sample = out_of_memory_beyond(1, engine.runner.sample, lambda arguments: len(arguments[0]))
    engine.runner.prefill = out_of_memory_beyond(1, engine.runner.prefill, lambda arguments: len(arguments[0]))
    got = [Collected(*request) for request in asked]
    engine.submit([each.job for each in got])
    assert [each.text() for each in got] == [each.text() for each in expected]


def test_where_memory_does_not_suffice_for_a_step_the_newest_texts_end(calm, tokenizer, engine_of, caplog):
    engine = engine_of(calm)
    engine.runner.end_ids = set()
    engine.runner.step = out_of_memory_beyond(2, engine.runner.step, lambda arguments: len(arguments[0]))
    jobs = [Collected(ids_of(tokenizer, "fox"), 30, SamplingParams(), seed) for seed in range(4)]
    engine.submit([each.job for each in jobs])
    assert [each.chunks()[-1].finish_reason for each in jobs] == ["length", "length", "error", "error"]
    assert "no memory for a step of 4 sequences: the newest one ends" in caplog.text


def test_exact_sampling_takes_a_bounded_number_of_draws_in_a_step(calm, tokenizer, engine_of):
    """Thousands of draws for one chunk do not hold up the other texts."""
    engine, most, in_step = engine_of(calm), [], [0]
    engine.runner.end_ids = set()
    sample, step = calm.head.sample, engine._step

    def counted(hidden, **options):
        in_step[0] = max(in_step[0], options.get("num_samples") or 1)
        return sample(hidden, **options)

    def stepped():
        in_step[0] = 0
        step()
        most.append(in_step[0])

    engine._step = stepped
    hard = Collected(ids_of(tokenizer, "the quick"), 9, SamplingParams(0.2, "exact", 16), 0)
    other = Collected(ids_of(tokenizer, "a"), 30, SamplingParams(), 1)
    try:
        calm.head.sample = counted
        engine.submit([hard.job, other.job])
        chunks = hard.chunks()
        other.chunks()
    finally:
        del calm.head.sample
    assert max(chunk.num_samples for chunk in chunks) > 64
    assert max(most) <= 64


def test_an_answer_keeps_the_space_before_its_first_word():
    """Tokenizers of the SentencePiece type drop it where a text begins."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    model.train_from_iterator(["the quick brown fox"] * 9, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    metaspace = PreTrainedTokenizerFast(tokenizer_object=model)
    whole, prompt = (ids_of(metaspace, text) for text in ("the quick brown fox", "the quick"))
    assert whole[: len(prompt)] == prompt
    stream = TextStream(metaspace, (), prompt)
    assert "".join(stream.add([token]) for token in whole[len(prompt) :]) == " brown fox"


def test_a_step_that_fails_is_told_and_the_engine_goes_on(calm, tokenizer, engine_of, monkeypatch, caplog):
    engine = engine_of(calm)
    engine.runner.end_ids = set()
    monkeypatch.setattr(engine.runner, "sample", None)
    failed = Collected([], 5, SamplingParams(), 0)
    engine.submit([failed.job])
    assert failed.chunks()[-1].finish_reason == "error"
    assert "a step failed" in caplog.text
    monkeypatch.undo()
    fine = Collected([], 5, SamplingParams(), 0)
    engine.submit([fine.job])
    assert fine.chunks()[-1].finish_reason == "length"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_text_comes_in_whole_characters_and_is_all_there(tokenizer, size):
    text = "größer, 漢字, \U0001f600\U0001f680: the quick\n\n brown  fox"
    ids = ids_of(tokenizer, text)
    stream = TextStream(tokenizer)
    pieces = [
        stream.add(ids[start : start + size], last=start + size >= len(ids)) for start in range(0, len(ids), size)
    ]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_not_held_back_for_ever(tokenizer):
    ids = ids_of(tokenizer, "漢")[:-1]
    stream = TextStream(tokenizer)
    assert stream.add(ids) == ""
    assert stream.add([], last=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_nothing_of_a_stop_string_gets_out(tokenizer, size):
    ids = ids_of(tokenizer, "the quick brown fox jumps")
    stream, out = TextStream(tokenizer, ["own f", "jumps"]), ""
    for start in range(0, len(ids), size):
        out += stream.add(ids[start : start + size])
        assert "the quick br".startswith(out)
        if stream.stopped:
            break
    assert out == "the quick br"
    stream = TextStream(tokenizer, ["fox!"])
    assert stream.add(ids_of(tokenizer, "a fox")) == "a "
    assert stream.add(ids_of(tokenizer, "es"), last=True) == "foxes"
