"""BrierLM against exact enumeration, on models so small that every continuation can be listed."""

import hashlib
import json
from itertools import product

import golden
import numpy as np
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm.data.blocks import TokenBlocks
from calm.data.blocks import shuffled as shuffled_order
from calm.evaluation import branches
from calm.evaluation.brier_lm import _drawer, evaluate_brier
from calm.evaluation.brier_scores import NGRAM, score_calm, score_token_model
from calm.evaluation.ngram_baselines import _transition_table, evaluate_counts
from calm.functional.brier import prefix_equal
from calm.generation.sampling_params import SamplingParams
from calm.report.tables import brier_cell


class Blocks:
    """Blocks of given tokens, with what the evaluation asks of prepared data."""

    def __init__(self, ids, vocab_size):
        self.ids, self.block_size, self.manifest = ids, ids.shape[1], {"vocab_size": vocab_size}

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index]}

    def documents(self, num_blocks=None):
        return list(range(len(self.ids[:num_blocks])))

    def batches(self, num_blocks, batch_size, shuffle_seed=None):
        yield from self.ids[:num_blocks].split(batch_size)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def plain_draws(model, generator):
    def draw(hidden, count, _):
        params = SamplingParams(sampler="batch").with_defaults()
        return model.sample_patch(hidden.repeat(count, 1), params, generator).tokens.unflatten(0, (count, -1))

    return draw


def token_model(vocab_size=5):
    torch.manual_seed(1)
    config = LlamaConfig(**tiny.backbone(vocab_size=vocab_size, eos_token_id=1, pad_token_id=0, bos_token_id=None))
    return LlamaForCausalLM(config).eval()


def exact_brier(probability_of_all, target):
    """Brier-1..n of a table of all n-grams: ``2 P(y) - sum P^2`` of every prefix."""
    scores = []
    for n in range(1, NGRAM + 1):
        prefix = probability_of_all.sum(dim=tuple(range(n, NGRAM))) if n < NGRAM else probability_of_all
        scores.append(2 * prefix[tuple(target[:n])] - prefix.square().sum())
    return torch.stack(scores)


@torch.no_grad()
def test_token_model_scores_are_unbiased_by_enumeration():
    model, vocab_size = token_model(), 5
    ids = torch.randint(vocab_size, (1, 9))
    starts = torch.arange(2, 6, 2)
    exact = []
    for start in starts.tolist():
        grams = torch.tensor(list(product(range(vocab_size), repeat=NGRAM)))
        logits = model(torch.cat([ids[:, :start].expand(len(grams), -1), grams], dim=1)).logits.double()
        step = logits.softmax(-1)[:, start - 1 : -1].gather(-1, grams[..., None])[..., 0]
        exact.append(exact_brier(step.prod(-1).view([vocab_size] * NGRAM), ids[0, start : start + NGRAM]))
    exact = torch.stack(exact)

    generator = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(40):
        hit, collision = score_token_model(model, ids.expand(50, -1), starts, 3, generator)
        scores.append(2 * hit - collision)
    scores = torch.cat(scores).double()
    error = scores.std(0) / len(scores) ** 0.5
    assert ((scores.mean(0) - exact).abs() <= 4 * error + 1e-6).all()
    assert torch.allclose(scores[:, :, 0].mean(0), exact[:, 0], atol=1e-6)  # Brier-1 of a token model is exact


@torch.no_grad()
@pytest.mark.parametrize("num_samples", [2, 5])
@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 8])
def test_calm_scores_are_unbiased_by_enumeration(patch_size, num_samples):
    """A real backbone and a head whose law is known: a softmax over all patches of three words."""
    model, words = tiny.calm(patch_size), torch.tensor([5, 6, 7])
    patches = words[torch.tensor(list(product(range(3), repeat=patch_size)))]  # [C, K]
    readout = torch.randn(16, len(patches), generator=seeded(2)) * 0.8
    starts = torch.tensor([patch_size, 2 * patch_size])
    num_patches = -(-NGRAM // patch_size)
    length = (2 + num_patches) * patch_size
    ids = words[torch.randint(3, (1, length), generator=seeded(5))]

    def law(hidden):
        return (hidden @ readout).softmax(-1)

    exact = []
    for start in starts.tolist():
        table = torch.zeros([3] * NGRAM, dtype=torch.float64)
        every = torch.tensor(list(product(range(len(patches)), repeat=num_patches)))
        text = torch.cat([ids[:, :start].expand(len(every), -1), patches[every].flatten(1)], dim=1)
        hidden = model(text).last_hidden_state[:, start // patch_size - 1 : -1]
        probability = law(hidden).gather(-1, every[..., None])[..., 0].prod(-1).double()
        table.index_put_(tuple((text[:, start : start + NGRAM] - 5).T), probability, accumulate=True)
        exact.append(exact_brier(table, ids[0, start : start + NGRAM] - 5))
    exact = torch.stack(exact)

    generator = seeded(0)

    def draw(hidden, count, _):
        return patches[torch.multinomial(law(hidden), count, True, generator=generator).T]

    scores = []
    for _ in range(30):
        hit, collision = score_calm(model, ids.expand(100, -1), starts, num_samples, draw)
        scores.append(2 * hit - collision)
    scores = torch.cat(scores).double()
    error = scores.std(0) / len(scores) ** 0.5
    assert ((scores.mean(0) - exact).abs() <= 4.5 * error + 1e-6).all()
    assert (exact.abs() > 5 * error).any(0).sum() >= 2  # the test can fail


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_scores_of_token_prediction_are_those_of_independent_tokens(patch_size):
    vocab_size, start = 3, patch_size
    model = tiny.calm(patch_size, vocab_size=vocab_size, token_prediction="independent")
    num_patches = -(-NGRAM // patch_size)
    ids = torch.randint(vocab_size, (1, start + num_patches * patch_size), generator=seeded(3))
    table = torch.zeros([vocab_size] * NGRAM, dtype=torch.double)
    for gram in product(range(vocab_size), repeat=NGRAM):
        text = ids.clone()
        text[0, start : start + NGRAM] = torch.tensor(gram)  # what lies behind it in its patch changes no state before
        hidden = model(text).last_hidden_state[0, start // patch_size - 1 : -1]
        states = model.mtp_head.proj(hidden).view(-1, hidden.shape[-1])
        law = (states @ model.get_input_embeddings().weight.T).double().softmax(-1)
        table[gram] = law[range(NGRAM), gram].prod()
    exact = 100 * exact_brier(table, ids[0, start : start + NGRAM])

    found = [
        evaluate_brier(
            model, Blocks(ids.expand(400, -1), vocab_size), start, num_samples=4, batch_size=100, seed=seed,
            sampler="mtp",
        )
        for seed in range(8)
    ]  # fmt: skip
    assert {each.sampler for each in found} == {"mtp"}
    scores = torch.tensor([each.brier for each in found]).double()
    assert ((scores.mean(0) - exact).abs() <= 5 * scores.std(0) / len(found) ** 0.5 + 1e-3).all()
    with pytest.raises(ValueError, match="this model was trained without it"):
        evaluate_brier(tiny.calm(), Blocks(tiny.tokens(1, 16), 5), 4, sampler="mtp")


@torch.no_grad()
@pytest.mark.parametrize(("patch_size", "head"), [(1, "energy"), (3, "energy"), (2, "flow")])
def test_calm_scores_equal_those_of_continuations_drawn_one_by_one(patch_size, head):
    """The tree draws from the same law as the plain model: the two estimates agree within their errors."""
    model = tiny.calm(patch_size, head)
    if head == "energy":
        torch.nn.init.normal_(model.head.output_layer.weight, std=0.05)  # draws collide often
    starts = torch.tensor([patch_size, 2 * patch_size])
    length = -(-(2 * patch_size + NGRAM) // patch_size) * patch_size
    # Text the model produces itself, so that hits are not all zero.
    model.generation_config.eos_token_id = None
    ids = model.generate(tiny.tokens(1, patch_size), max_new_tokens=length - patch_size, generator=seeded(1))

    generator, num_samples = seeded(0), 3
    tree = []
    for _ in range(30):
        hit, collision = score_calm(model, ids.expand(50, -1), starts, num_samples, plain_draws(model, generator))
        tree.append(2 * hit - collision)
    tree = torch.cat(tree).double()

    plain = []
    for start in starts.tolist():
        target = ids[0, start : start + NGRAM]
        prompts = ids[:, :start].expand(3000, -1)
        drawn = model.generate(prompts, max_new_tokens=NGRAM, temperature=1.0, generator=generator)[:, start:]
        first, second = drawn[:1500], drawn[1500:]
        plain.append(
            prefix_equal(first, target.expand_as(first))
            + prefix_equal(second, target.expand_as(second))
            - prefix_equal(first, second)
        )
    plain = torch.stack(plain, dim=1).double()
    error = (tree.var(0) / len(tree) + plain.var(0) / len(plain)).sqrt()
    assert ((tree.mean(0) - plain.mean(0)).abs() <= 4.5 * error + 1e-6).all()
    assert tree.mean(0)[:, 0].abs().min() > 0


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_tokens_left_out_beside_the_text_change_no_score(patch_size, monkeypatch):
    """The same latents, decoded in full and only while they agree: equal hits and collisions, fewer tokens decoded."""
    model = tiny.calm(patch_size)
    torch.nn.init.normal_(model.head.output_layer.weight, std=0.05)
    model.generation_config.eos_token_id = None
    ids = model.generate(tiny.tokens(3, patch_size), max_new_tokens=3 * max(4, patch_size), generator=seeded(1))
    starts = torch.arange(patch_size, ids.shape[1] - NGRAM + 1, patch_size)
    sources = []
    lazy_samples = model.lazy_samples
    model.lazy_samples = lambda *arguments: sources.append(lazy_samples(*arguments)) or sources[-1]
    monkeypatch.setattr("calm.functional.lazy_samples._FEW_TOKENS", 0)
    full = []

    def in_full(hidden, count, text):
        source = lazy_samples(hidden, generator)
        source.sample(count)
        for position in range(patch_size):
            source.decode(torch.ones(source.tokens.shape[:2], dtype=torch.bool), position)
        full.append((source.tokens, text))
        return source.tokens.movedim(1, 0)

    generator = seeded(3)
    whole = score_calm(model, ids, starts[:1], 6, in_full)
    lazy = score_calm(
        model, ids, starts[:1], 6, _drawer(model, SamplingParams(sampler="batch").with_defaults(), seeded(3))
    )
    torch.testing.assert_close(whole[0][..., :patch_size], lazy[0][..., :patch_size])
    torch.testing.assert_close(whole[1][..., :patch_size], lazy[1][..., :patch_size])
    # Beside the text, the first token of every draw is decoded, and a further one behind tokens that agree.
    (tokens, text), expected = full[0], 0
    for row, own in zip(text.tolist(), tokens.tolist(), strict=True):
        for number, place in product(range(6), range(min(patch_size, NGRAM))):
            others = [row, *own[:number], *own[number + 1 :]]
            expected += any(other[:place] == own[number][:place] for other in others)
    assert int(sources[0].num_decoded.sum()) == expected
    assert expected < tokens.numel() or patch_size == 1


@torch.no_grad()
def test_token_model_matches_the_reference_in_expectation():
    recorded = golden.load("brier/ar")
    model = LlamaForCausalLM.from_pretrained(golden.DATA / "brier" / "ar").eval()
    ids = recorded["input_ids"]
    golden.close(model(ids).logits, recorded["logits"])
    # The accuracy term is exact in both; the reference scores the predictions of positions 0 to S - 5.
    starts = torch.arange(1, ids.shape[1] - NGRAM + 1)
    hit, collision = score_token_model(model, ids, starts, 2, torch.Generator().manual_seed(0))
    probability = recorded["logits"].softmax(-1)
    steps = torch.stack(
        [probability[:, start - 1 : start + 3].gather(-1, ids[:, start : start + 4, None])[..., 0] for start in starts],
        1,
    )
    golden.close(hit, steps.cumprod(-1))
    golden.close(collision[..., 0], probability[:, starts - 1].square().sum(-1))


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_positions_scored_a_few_at_a_time_score_the_same(patch_size, monkeypatch):
    """With a head that always gives the same patch every draw agrees: the most branches there can be."""
    model, ids = tiny.calm(patch_size), tiny.tokens(2, 12)
    starts = torch.arange(patch_size, 12 - NGRAM + 1, patch_size)
    readout = torch.randn(16, 40, generator=seeded(1))

    def draw(hidden, count, _):
        return ((hidden @ readout).argmax(-1, keepdim=True) + torch.arange(patch_size)).expand(count, -1, -1)

    whole = score_calm(model, ids, starts, 4, draw)
    assert (whole[1] == 1).all()
    monkeypatch.setattr(branches, "_NODES", 2)
    for one, other in zip(whole, score_calm(model, ids, starts, 4, draw), strict=True):
        torch.testing.assert_close(one, other)
    token, ids = token_model(), ids % 5
    monkeypatch.setattr(branches, "_NODES", 512)
    hit, collision = score_token_model(token, ids, starts, 1, seeded(0))
    monkeypatch.setattr(branches, "_NODES", 1)
    pieces = score_token_model(token, ids, starts, 1, seeded(0))
    torch.testing.assert_close(hit, pieces[0])
    torch.testing.assert_close(collision[..., 0], pieces[1][..., 0])


def draws_apart(patch_size):
    """Of two draws of every state, one is all 5 and the other all 6."""
    return lambda hidden, count, _: torch.tensor([5, 6])[:count, None, None].expand(-1, len(hidden), patch_size)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_samples", [2, 8])
def test_the_passes_of_the_backbone_are_bounded_whatever_the_draws_do(patch_size, num_samples):
    """However often draws agree: positions that go through the backbone, against those of a plain pass."""
    model, ids = tiny.calm(patch_size), tiny.tokens(2, 48)
    starts = torch.arange(patch_size, 48 - NGRAM + 1, patch_size)
    positions = []

    def count(_, __, kwargs):
        positions.append(kwargs["inputs_embeds"].shape[1])

    model.backbone.register_forward_pre_hook(count, with_kwargs=True)

    def pairs(hidden, count, _):  # the worst case: every draw agrees with one other
        return (torch.arange(count) // 2 + 7)[:, None, None].expand(-1, len(hidden), patch_size)

    score_calm(model, ids, starts, num_samples, pairs)
    passes = 1 + (-(-NGRAM // patch_size) - 1) * num_samples // 2
    assert (passes - 1) * 40 // patch_size < sum(positions) <= passes * 48 // patch_size
    # Where draws never agree, only the block itself goes through.
    positions.clear()
    score_calm(model, ids, starts, 2, draws_apart(patch_size))
    assert sum(positions) == 48 // patch_size


def test_a_target_error_ends_the_evaluation():
    model = token_model()
    model.lm_head.weight.data *= 2  # a surer model, on text of its own
    torch.manual_seed(0)
    ids = model.generate(
        torch.full((400, 1), 2), min_new_tokens=11, max_new_tokens=11, do_sample=True, top_k=0, eos_token_id=None
    )
    exact = evaluate_brier(model, Blocks(ids, 5), stride=2)
    result = evaluate_brier(model, Blocks(ids, 5), stride=2, target_error=3 * exact.brier_lm_error)
    assert exact.brier_lm > 5
    assert 32 <= result.num_blocks < 200
    assert result.brier_lm_error <= 3 * exact.brier_lm_error
    assert abs(result.brier_lm - exact.brier_lm) < 5 * result.brier_lm_error


def test_a_score_of_zero_is_not_taken_for_a_sure_one():
    """Brier scores below 0 make BrierLM 0, whatever the blocks: the error of the scores themselves counts then."""
    ids = torch.randint(2, 5, (64, 12))
    result = evaluate_brier(token_model(), Blocks(ids, 5), stride=2, target_error=1e-3)
    assert result.brier_lm == 0
    assert result.num_blocks == 64


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_scores_at_a_temperature_are_those_of_the_sharpened_model(temperature):
    model, blocks = token_model(), Blocks(torch.randint(2, 5, (4, 12)), 5)
    at_temperature = evaluate_brier(model, blocks, stride=2, temperature=temperature)
    plain = evaluate_brier(model, blocks, stride=2)
    model.lm_head.weight.data /= temperature
    scaled = evaluate_brier(model, blocks, stride=2)
    assert at_temperature.accuracy == pytest.approx(scaled.accuracy, rel=1e-5)
    assert at_temperature.collision == pytest.approx(scaled.collision, rel=1e-5)
    assert (at_temperature.collision[0] > plain.collision[0]) == (temperature < 1)


def test_a_calm_at_low_temperature_agrees_with_itself_more_often():
    calm = tiny.calm(2)
    torch.nn.init.normal_(calm.head.output_layer.weight, std=0.1)
    blocks = Blocks(tiny.tokens(4, 12), tiny.VOCAB_SIZE)
    warm, cold = (evaluate_brier(calm, blocks, stride=2, temperature=t, num_candidates=40) for t in (1.0, 0.5))
    assert cold.collision[1] > 1.3 * warm.collision[1]


def test_result_states_its_protocol_and_errors():
    blocks = Blocks(torch.randint(2, 5, (32, 12)), 5)
    result = evaluate_brier(token_model(), blocks, stride=2, num_samples=2, batch_size=4, seed=3)
    assert (result.num_blocks, result.num_positions, result.block_size) == (32, 32 * 4, 12)
    assert result.brier_error[0] > 0
    again = evaluate_brier(token_model(), blocks, stride=2, num_samples=2, batch_size=4, seed=3)
    assert result.brier == again.brier
    assert result.data_sha256 == hashlib.sha256(blocks.ids.numpy().tobytes()).hexdigest()


def test_too_few_blocks_have_no_error():
    result = evaluate_brier(token_model(), Blocks(torch.randint(2, 5, (31, 12)), 5), stride=2, num_samples=2)
    assert (result.brier_lm_error, result.brier_error) == (None, None)
    assert brier_cell(result.to_dict()) == f"{result.brier_lm:.2f}"
    with pytest.raises(ValueError, match="num_blocks must be at least 1, or None for all, got 0"):
        evaluate_brier(token_model(), Blocks(torch.randint(2, 5, (7, 12)), 5), stride=2, num_blocks=0)


def test_standard_error_shrinks_with_the_number_of_blocks():
    few = evaluate_brier(token_model(), Blocks(torch.randint(2, 5, (32, 12)), 5), stride=2, num_samples=2)
    many = evaluate_brier(token_model(), Blocks(torch.randint(2, 5, (512, 12)), 5), stride=2, num_samples=2)
    assert many.brier_error[0] < 0.6 * few.brier_error[0]


def test_blocks_of_a_result_are_in_the_order_of_the_text(tmp_path):
    """A target error takes them in random order; which blocks are neighbours decides the standard error."""
    (np.arange(40 * 12) ** 2 // 7 % 5).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    manifest = {
        "files": [{"name": "tokens.bin", "num_tokens": 480}],
        "token_bytes": 2,
        "vocab_size": 5,
        "eos_token_id": 1,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"num_tokens": 480}))
    blocks, model = TokenBlocks(tmp_path, 12), token_model()
    plain = evaluate_brier(model, blocks, stride=2, batch_size=3)
    for target_error, count in ((1e-9, 40), (1e9, 33)):
        shuffled = evaluate_brier(model, blocks, stride=2, batch_size=3, target_error=target_error)
        assert shuffled.num_blocks == count
        assert shuffled.data_sha256 != plain.data_sha256
        # Brier-1 of a token model takes no samples.
        chosen = sorted(shuffled_order(range(40), 0)[:count])
        expected = [plain.block_brier[index][0] for index in chosen]
        assert [block[0] for block in shuffled.block_brier] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_count_models_equal_enumeration(order):
    vocab_size = 4
    train, validation = (
        Blocks(torch.randint(vocab_size, (20, 16)), vocab_size),
        Blocks(torch.randint(vocab_size, (1, 6)), vocab_size),
    )
    result = evaluate_counts(train, validation, order, stride=2)
    table = _transition_table(train, order).expand(vocab_size, -1).double()
    ids = validation.ids[0]
    every = torch.ones([vocab_size] * NGRAM, dtype=torch.float64)
    for gram in product(range(vocab_size), repeat=NGRAM):
        before = ids[1]
        for token in gram:
            every[gram] *= table[before, token]
            before = token
    torch.testing.assert_close(
        torch.tensor(result.brier).double() / 100, exact_brier(every, ids[2:6]), rtol=1e-4, atol=1e-6
    )


def test_token_models_that_change_their_logits_are_refused():
    model = token_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="with final_logit_softcapping cannot be scored"):
        evaluate_brier(model, Blocks(torch.randint(5, (2, 12)), 5), stride=2)


def test_damaged_weights_are_reported():
    model = token_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="gives NaN or infinity"):
        evaluate_brier(model, Blocks(torch.randint(5, (2, 12)), 5), stride=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 3}, "stride must be a multiple of the model's patch size 4, got 3"),
        ({"stride": 4, "target_error": float("nan")}, "target_error must be above 0, got nan"),
        ({"stride": 4, "num_samples": 1}, "num_samples must be at least 2"),
        ({"stride": 12}, "block_size must be at least 16 to hold a scored n-gram, got 12"),
    ],
)
def test_impossible_protocols_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_brier(tiny.calm(), Blocks(tiny.tokens(2, 12), tiny.VOCAB_SIZE), **arguments)


def test_blocks_beyond_the_context_are_refused_as_in_generation():
    ids = torch.randint(2, tiny.VOCAB_SIZE, (2, 65 * 4))
    with pytest.raises(
        ValueError, match=r"blocks of 260 tokens are 65 positions, .* context has 64: .* at most 256 tokens"
    ):
        evaluate_brier(tiny.calm(), Blocks(ids, tiny.VOCAB_SIZE), stride=4)
    assert evaluate_brier(tiny.calm(), Blocks(ids[:, :256], tiny.VOCAB_SIZE), stride=4, num_samples=2).num_blocks == 2


def test_a_low_temperature_of_a_token_model_stays_a_number():
    blocks = Blocks(torch.randint(2, 5, (8, 12)), 5)
    assert evaluate_brier(token_model(), blocks, stride=2, temperature=1e-39).collision[0] == pytest.approx(100)


def test_a_token_model_takes_seven_passes_at_most():
    model, blocks, positions = token_model(), Blocks(torch.randint(2, 5, (2, 24)), 5), []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(
            (args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))).shape[1]
        ),
        with_kwargs=True,
    )
    evaluate_brier(model, blocks, stride=1, num_samples=32)
    assert 6 * 20 < sum(positions) <= 7 * 24
