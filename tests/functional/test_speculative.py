"""Verification rules: the law of what is accepted, by exact enumeration and by counting."""

import itertools

import pytest
import torch

from calm.functional.speculative import Verified, best_draft_length, expected_accepted, verify_candidates, verify_chain

V, ROWS = 4, 400_000


def probs(*shape, seed, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, V, generator=generator, dtype=torch.float64) * 1.5 / temperature).softmax(-1)


class Chain:
    """A target and a drafter over two tokens: p(x), p(y | x), q(x), q(y | x)."""

    def __init__(self, temperature):
        self.first, self.second = probs(seed=0, temperature=temperature), probs(V, seed=1, temperature=temperature)
        self.draft_first, self.draft_second = probs(seed=2), probs(V, seed=3)

    def law(self):
        return self.first[:, None] * self.second

    def sample(self, rule, deterministic=False):
        """Return counts of the first two tokens that a rule produces, ``[V, V]``, for a draft of two tokens."""
        generator = torch.Generator().manual_seed(4)
        if deterministic:
            tokens = torch.tensor([[1, 2]]).expand(ROWS, 2)
            draft = None
        else:
            x = torch.multinomial(self.draft_first, ROWS, replacement=True, generator=generator)
            y = torch.multinomial(self.draft_second[x], 1, generator=generator)[:, 0]
            tokens = torch.stack([x, y], 1)
            draft = torch.stack([self.draft_first.expand(ROWS, V), self.draft_second[x]], 1)
        third = torch.full((ROWS, V), 1 / V, dtype=torch.float64)
        target = torch.stack([self.first.expand(ROWS, V), self.second[tokens[:, 0]], third], 1)
        uniforms = torch.rand(ROWS, 3, generator=generator, dtype=torch.float64)
        result = rule(target, tokens, draft, uniforms)
        first = torch.where(result.num_accepted > 0, tokens[:, 0], result.next_token)
        # After a rejection of the first token, the second comes from the target itself, as in the next round.
        again = torch.multinomial(self.second[first], 1, generator=generator)[:, 0]
        second = torch.where(result.num_accepted > 1, tokens[:, 1], result.next_token)
        second = torch.where(result.num_accepted > 0, second, again)
        return torch.bincount(first * V + second, minlength=V * V).view(V, V)


def chi_square(counts, law):
    expected = law * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


LIMIT = 44.3  # of chi-square with 15 degrees of freedom: exceeded once in 10,000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("deterministic", [False, True])
def test_two_tokens_have_the_law_of_the_target(temperature, deterministic):
    chain = Chain(temperature)
    assert chi_square(chain.sample(verify_chain, deterministic), chain.law()) < LIMIT


def without_residual(target, tokens, draft, uniforms):
    """Sample from the target itself after a rejection."""
    result = verify_chain(target, tokens, draft, uniforms)
    fresh = torch.multinomial(target[torch.arange(len(tokens)), result.num_accepted], 1)[:, 0]
    return Verified(result.num_accepted, torch.where(result.num_accepted < 2, fresh, result.next_token))


def with_wrong_position(target, tokens, draft, uniforms):
    return verify_chain(target, tokens, draft.flip(1), uniforms)


def with_error_of_two_percent(target, tokens, draft, uniforms):
    return verify_chain(0.98 * target + 0.02 / V, tokens, draft, uniforms)


@pytest.mark.parametrize("broken", [without_residual, with_wrong_position, with_error_of_two_percent])
def test_the_count_finds_a_broken_rule(broken):
    torch.manual_seed(0)
    chain = Chain(1.0)
    assert chi_square(chain.sample(broken), chain.law()) > LIMIT


def exact_law(rule_of_uniforms, num_uniforms, grid):
    """Return the law of a rule by the midpoint rule over all its uniform numbers: exact up to 1 / grid."""
    points = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    uniforms = torch.tensor(list(itertools.product(points.tolist(), repeat=num_uniforms)), dtype=torch.float64)
    return torch.bincount(rule_of_uniforms(uniforms), minlength=V).double() / len(uniforms)


def test_one_token_has_the_law_of_the_target_by_enumeration():
    p, q = probs(seed=5), probs(seed=6)
    for draft in (q, None):
        law = torch.zeros(V, dtype=torch.float64)
        for x in range(V):
            weight = q[x] if draft is not None else float(x == 2)
            if weight == 0:
                continue

            def rule(uniforms, x=x, draft=draft):
                rows = len(uniforms)
                tokens = torch.full((rows, 1), x)
                proposal = None if draft is None else draft.expand(rows, 1, V)
                result = verify_chain(p.expand(rows, 2, V), tokens, proposal, uniforms)
                return torch.where(result.num_accepted > 0, tokens[:, 0], result.next_token)

            law += weight * exact_law(rule, 2, 400)
        torch.testing.assert_close(law, p, atol=2 / 400, rtol=0)


@pytest.mark.parametrize("candidates", [[0], [3, 1], [2, 2, 0], [0, 1, 2, 3]])
def test_candidates_of_unknown_law_leave_the_law_of_the_target(candidates):
    p = probs(seed=7)
    generator = torch.Generator().manual_seed(8)
    uniforms = torch.rand(ROWS, len(candidates) + 1, generator=generator, dtype=torch.float64)
    tokens, choice = verify_candidates(p.expand(ROWS, V), torch.tensor(candidates).expand(ROWS, -1), uniforms)
    assert chi_square(torch.bincount(tokens, minlength=V), p) < 21.1  # 3 degrees of freedom, once in 10,000
    accepted = choice >= 0
    assert (tokens[accepted] == torch.tensor(candidates)[choice[accepted]]).all()
    # Distinct candidates are accepted as often as the target samples one of them.
    assert float(accepted.double().mean()) == pytest.approx(float(p[sorted(set(candidates))].sum()), abs=5e-3)


def test_a_target_without_doubt_accepts_its_own_tokens_alone():
    target = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3], [1, 2, 3]]), V).double()
    tokens = torch.tensor([[1, 2], [1, 0]])
    uniforms = torch.full((2, 3), 0.999, dtype=torch.float64)
    result = verify_chain(target, tokens, None, uniforms)
    assert result.num_accepted.tolist() == [2, 1]
    assert result.next_token.tolist() == [3, 2]


def test_the_draft_length_follows_from_the_times_of_a_pass():
    acceptance = torch.tensor([0.8, 0.7, 0.6])
    assert float(expected_accepted(acceptance)) == pytest.approx(1 + 0.8 + 0.56 + 0.336)
    assert best_draft_length(acceptance, [1.0] * 4, 0.0) == 3
    assert best_draft_length(acceptance, [1.0, 1.1, 3.0, 5.0], 0.0) == 1
    assert best_draft_length(acceptance, [1.0, 2.0, 3.0, 4.0], 0.0) == 0
    assert best_draft_length(acceptance, [1.0] * 4, 5.0) == 0


def test_a_rejection_by_rounding_gives_a_possible_token():
    target = torch.tensor([[[0.7, 0.3 - 1e-7, 0.0, 0.0], [0.25] * 4]])
    draft = torch.tensor([[[0.7, 0.3, 0.0, 0.0]]])  # q is nowhere below p
    result = verify_chain(target, torch.tensor([[1]]), draft, torch.tensor([[1 - 1e-8, 0.999]]).clamp(max=0.9999999))
    assert result.num_accepted.tolist() == [0]
    assert result.next_token.item() in (0, 1)
