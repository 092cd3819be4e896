"""Generation with a drafter does not change the target's text or its distribution."""

import itertools

import pytest
import torch
from drafting_models import MASK, PROMPTS, SIZES, make_drafter, make_target
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from calm.generation.drafting import generate_with_drafter
from calm.models.drafters import DRAFTERS, DrafterConfig, load_drafter
from calm.models.drafters.base import target_hash


class Oracle(DRAFTERS["mtp"]):
    """A drafter that proposes the target's own greedy continuation up to a wrong token at a given place."""

    wrong_at = None

    def propose(self, features, token_ids, temperature, num_tokens, generator=None, state=None):
        draft = super().propose(features, token_ids, temperature, num_tokens, generator, state)
        known = self.answers[:, : self.answers.shape[1]]
        for row, token in enumerate(token_ids.tolist()):
            place = self.places[row]
            follow = known[row, place + 1 : place + 1 + num_tokens]
            draft.tokens[row, : len(follow)] = follow
            if self.wrong_at is not None and self.wrong_at < num_tokens:
                draft.tokens[row, self.wrong_at] = (draft.tokens[row, self.wrong_at] + 1) % self.answers.max()
            assert known[row, place] == token
        return draft


@pytest.mark.parametrize("drafter_type", sorted(DRAFTERS))
@pytest.mark.parametrize("length", [1, 4])
def test_greedy_text_is_that_of_the_target(drafter_type, length):
    target = make_target()
    drafter = make_drafter(target, drafter_type)
    expected = target.generate(PROMPTS, attention_mask=MASK, max_new_tokens=30, do_sample=False)
    result = generate_with_drafter(target, drafter, PROMPTS, MASK, max_new_tokens=30, num_draft_tokens=length)
    assert result.sequences.tolist() == expected.tolist()
    assert result.statistics.num_drafted > 0


@pytest.mark.parametrize("wrong_at", [None, 0, 2])
def test_right_drafts_save_passes_of_the_target(wrong_at):
    target = make_target()
    expected = target.generate(PROMPTS[1:2], max_new_tokens=26, do_sample=False)[:, 5:]
    config = DrafterConfig(num_tokens=4, hidden_size=32, shortlist_size=20, target_hash=target_hash(target.config))
    drafter = Oracle(config).attach(target)
    drafter.answers, drafter.wrong_at, drafter.places = expected, wrong_at, [0]

    def follow(added):
        drafter.places[0] += len(added[0])
        return False

    drafter.places[0] = -1
    result = generate_with_drafter(target, drafter, PROMPTS[1:2], max_new_tokens=26, on_tokens=follow)
    assert result.sequences[:, 5:].tolist() == expected.tolist()
    if wrong_at is None:
        assert result.statistics.num_verifications == 5  # 1 + 5 * 5 tokens
        assert result.statistics.tokens_per_verification == 5
    else:
        assert result.statistics.tokens_per_verification == pytest.approx(1 + wrong_at, abs=0.3)


def test_texts_end_at_the_end_token_and_are_padded():
    target = make_target()
    free = target.generate(PROMPTS, attention_mask=MASK, max_new_tokens=20, do_sample=False)
    end = int(free[0, 5 + 6])
    target.generation_config.eos_token_id = end
    expected = target.generate(PROMPTS, attention_mask=MASK, max_new_tokens=20, do_sample=False)
    result = generate_with_drafter(target, make_drafter(target, "mtp"), PROMPTS, MASK, max_new_tokens=20)
    assert result.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("drafter_type", sorted(DRAFTERS))
def test_sampled_texts_have_the_distribution_of_the_target(drafter_type):
    size, rows = 6, 40_000
    target = make_target(vocab_size=size, scale=1.5)
    drafter = make_drafter(target, drafter_type, shortlist=4)  # two tokens are never drafted
    prompt = torch.tensor([[3, 1]])
    law = torch.zeros(size**3, dtype=torch.float64)
    for index, (x, y, z) in enumerate(itertools.product(range(size), repeat=3)):
        ids = torch.tensor([[3, 1, x, y, z]])
        log_probs = target(ids).logits[0].detach().double().log_softmax(-1)
        law[index] = (log_probs[1, x] + log_probs[2, y] + log_probs[3, z]).exp()
    torch.manual_seed(0)
    result = generate_with_drafter(target, drafter, prompt.expand(rows, -1), max_new_tokens=3, temperature=1.0)
    new = result.sequences[:, 2:5]
    counts = torch.bincount(new[:, 0] * size**2 + new[:, 1] * size + new[:, 2], minlength=size**3).double()

    def statistic(law):
        expected = law * rows
        common = expected > 5
        return float(((counts - expected) ** 2 / expected)[common].sum()), int(common.sum()) - 1

    value, freedom = statistic(law)
    limit = freedom + 3.7 * (2 * freedom) ** 0.5 + 5  # about once in 10,000
    assert value < limit
    assert statistic(0.98 * law + 0.02 / size**3)[0] > limit  # an error of 2% would be found
    assert result.statistics.num_accepted > 0


def test_a_text_does_not_depend_on_its_neighbours():
    target = make_target(scale=2.0)
    drafter = make_drafter(target, "categorical_flow")

    def texts(rows):
        generators = [torch.Generator().manual_seed(10 + row) for row in rows]
        result = generate_with_drafter(
            target, drafter, PROMPTS[rows], MASK[rows], max_new_tokens=25, temperature=1.0, generator=generators
        )
        return result.sequences[:, 5:].tolist()

    together = texts([0, 1, 2])
    assert [texts([row])[0] for row in range(3)] == together


def test_a_drafter_survives_saving(tmp_path):
    target = make_target()
    for drafter_type in DRAFTERS:
        drafter = make_drafter(target, drafter_type)
        drafter.save_pretrained(tmp_path / drafter_type)
        loaded = load_drafter(tmp_path / drafter_type).attach(target)
        for name, tensor in drafter.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_wrong_targets_and_settings_are_refused_in_one_line(tmp_path):
    target = make_target()
    drafter = make_drafter(target, "mtp")
    with pytest.raises(ValueError, match="trained for another target"):
        drafter.attach(make_target(vocab_size=60))
    with pytest.raises(ValueError, match=r"num_draft_tokens must be in \[1, 4\] for this drafter, got 5"):
        generate_with_drafter(target, drafter, PROMPTS, num_draft_tokens=5)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate_with_drafter(target, drafter, PROMPTS[:, :0])
    window = MistralForCausalLM(MistralConfig(**SIZES, vocab_size=50, num_key_value_heads=4, sliding_window=8))
    with pytest.raises(ValueError, match="sliding_window cannot be verified with a drafter"):
        generate_with_drafter(window, drafter, PROMPTS)
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="recurrent state instead of a cache"):
        generate_with_drafter(recurrent, drafter, PROMPTS)
    with pytest.raises(ValueError, match="do not fit the context of 2048 tokens"):
        generate_with_drafter(target, drafter, PROMPTS, max_new_tokens=2040)
    with pytest.raises(ValueError, match="has no config"):
        load_drafter(tmp_path)
    target.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a drafter"):
        load_drafter(tmp_path)
    with pytest.raises(ValueError, match="drafter_type must be one of"):
        DrafterConfig(drafter_type="medusa")
