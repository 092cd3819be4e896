"""Verification of drafted tokens: what is accepted follows exactly the target's distribution.

A drafter proposes tokens; the target model gives its own probabilities for every one of them in one pass. Two rules:

- Known proposal (Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318): accept a token x with
  probability min(1, p(x) / q(x)); after the first rejection sample from max(p - q, 0), normalised. The noise of a
  drafter may be an auxiliary variable: then q is the distribution given this noise. A proposal of unknown q is accepted
  with probability p(x), and the residual is p without x.
- Several candidates for one position whose q is unknown: accept a candidate with probability p(x); otherwise remove it
  from p, normalise, and try the next distinct one.

Shapes: B rows, G drafted tokens, C candidates, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from calm.functional.rng import pick


@dataclass
class Verified:
    """Result of a verification.

    Args:
        num_accepted: drafted tokens that are accepted, ``[B]``, 0 to G.
        next_token: the token after them, ``[B]``, sampled from the residual or, if all were accepted, from the target.
    """

    num_accepted: Tensor
    next_token: Tensor


def verify_chain(target_probs: Tensor, tokens: Tensor, draft_probs: Tensor | None, uniforms: Tensor) -> Verified:
    """Accept the longest prefix of drafted tokens, and sample one more token.

    Args:
        target_probs: probabilities of the target at every drafted position and after the last, ``[B, G + 1, V]``.
        tokens: drafted tokens, ``[B, G]``.
        draft_probs: probabilities q that the tokens were sampled from, ``[B, G, V]``; None if q is unknown, or if the
            proposal is deterministic.
        uniforms: in [0, 1), ``[B, G + 1]``: one number per decision, the last one for the token after the prefix.
    """
    num_drafted = tokens.shape[1]
    target = target_probs[:, :num_drafted].gather(-1, tokens[..., None])[..., 0]
    if draft_probs is None:
        is_accepted = uniforms[:, :num_drafted] < target
    else:
        # u < p / q, without the division: a token that was sampled has q > 0.
        drafted = draft_probs.gather(-1, tokens[..., None])[..., 0]
        is_accepted = uniforms[:, :num_drafted] * drafted < target
    num_accepted = is_accepted.long().cumprod(1).sum(1)
    rows = torch.arange(len(tokens), device=tokens.device)
    after = target_probs[rows, num_accepted]  # [B, V], of the first position that is not accepted
    if num_drafted:
        position = num_accepted.clamp(max=num_drafted - 1)
        if draft_probs is None:
            proposed = torch.zeros_like(after).scatter_(1, tokens[rows, position][:, None], 1.0)
        else:
            proposed = draft_probs[rows, position]
        is_rejected = (num_accepted < num_drafted)[:, None]
        residual = (after - proposed).clamp(min=0)
        # Where p equals q up to rounding, nothing is left over; a rejection is then an accident of rounding itself.
        is_empty = residual.sum(1, keepdim=True) <= 0
        after = torch.where(is_rejected & ~is_empty, residual, after)
    return Verified(num_accepted, pick(after, uniforms[:, num_drafted:])[:, 0])


def verify_candidates(target_probs: Tensor, candidates: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Accept one of several candidates for one position, or sample another token.

    The candidates of a row are tried in their order; one that was tried already is passed over. The law of the returned
    token is ``target_probs``, whatever the candidates are, as long as they do not depend on ``uniforms``.

    Args:
        target_probs: ``[B, V]``.
        candidates: ``[B, C]``.
        uniforms: in [0, 1), ``[B, C + 1]``.

    Returns:
        the tokens ``[B]``, and which candidate each of them is, ``[B]``; -1 for none.
    """
    remaining = target_probs.clone()
    choice = torch.full(candidates.shape[:1], -1, device=candidates.device)
    for index, candidate in enumerate(candidates.unbind(1)):
        # A candidate that was tried has probability 0 now, so it is never accepted a second time.
        probability = remaining.gather(1, candidate[:, None])[:, 0]
        total = remaining.sum(1)
        is_accepted = (choice < 0) & (uniforms[:, index] * total < probability)
        choice = torch.where(is_accepted, index, choice)
        remaining = remaining.scatter(1, candidate[:, None], 0.0)
    sampled = pick(remaining, uniforms[:, -1:])[:, 0]
    accepted = candidates.gather(1, choice.clamp(min=0)[:, None])[:, 0]
    return torch.where(choice < 0, sampled, accepted), choice


def expected_accepted(acceptance: Tensor) -> Tensor:
    """Return the expected number of tokens per verification, the last one included: ``[..., G] -> [...]``.

    Args:
        acceptance: probability that each drafted token is accepted, given that those before it are.
    """
    return 1 + acceptance.cumprod(-1).sum(-1)


def best_draft_length(acceptance: Tensor, pass_seconds: list[float], draft_seconds: float) -> int:
    """Return the number of drafted tokens with the most tokens per second; 0 if drafting does not pay.

    Args:
        acceptance: as for :func:`expected_accepted`, ``[G]``.
        pass_seconds: time of one pass of the target over 1, 2, ..., G + 1 tokens.
        draft_seconds: time of one proposal.
    """
    speeds = [1 / pass_seconds[0]]
    for length in range(1, len(acceptance) + 1):
        tokens = float(expected_accepted(acceptance[:length]))
        speeds.append(tokens / (pass_seconds[length] + draft_seconds))
    return max(range(len(speeds)), key=speeds.__getitem__)
