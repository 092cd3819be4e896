"""Sampling at a temperature when the model is only a sampler (the paper's temperature sampling).

A likelihood-free model gives draws x ~ P, never P(x). A power of P comes from agreement: n independent draws
are all equal to x with probability P(x)^n.

With n = floor(1/T) and a = 1/T - n, an *attempt* draws n chunks and fails unless all agree on x; if a > 0, it looks
for x once more in at most L further draws, where P(L >= i) = (1 - a/1) ... (1 - a/(i-1)), and fails if none is x. This
Bernoulli factory succeeds with probability P(x)^a, so the x of the first attempt that succeeds has probability
~ P(x)^(1/T).

- The *exact* sampler makes every attempt with fresh draws.
- The *batch* sampler makes its attempts with an urn of N draws, without replacement within an attempt. That gives a
  chunk that is c times in the urn the weight c! / (c - 1/T)!: where 1/T is whole, the number of n-subsets of draws that
  agree on it. It is consistent in N and costs at most N draws: when attempts keep failing, the whole urn is counted.

Shapes: R rows (contexts), S draws of a row, A attempts, K tokens of a chunk.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from calm.functional.lazy_samples import Draws
from calm.functional.rng import Generator, finest

# Of a token model, whose logits are divided by it: there the likeliest token is as good as certain.
LOWEST_TEMPERATURE = 1e-6

# The urn is opened in steps: a few draws settle a context where the model is sure.
_URN_STEPS = (4, 16, 64)
_ROUND_LIMIT = 64  # draws of a row at once, exact sampler
_TRIALS = 3  # further draws an attempt has at hand; more are needed rarely, and are drawn then


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities of tokens to the power of 1 / temperature, ``[..., V]``, in float32.

    However low the temperature, the likeliest token stays a number.
    """
    logits = logits.float()
    if temperature == 1:
        return logits.softmax(-1)
    return ((logits - logits.amax(-1, keepdim=True)) / max(temperature, LOWEST_TEMPERATURE)).softmax(-1)


def check_known_temperature(temperature: float) -> None:
    """Raise ValueError when a temperature of known probabilities is negative or not a number."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 (0 chooses the most likely token), got {temperature}.")


def check_temperature(temperature: float) -> float:
    """Returns 1 / temperature, or raises ValueError when the temperature is not in (0, 1]."""
    if not 0 < temperature <= 1 or math.isinf(1 / temperature):
        raise ValueError(
            f"temperature must lie in (0, 1], got {temperature}: draws of the model can be sharpened, not flattened; "
            "take a small value such as 0.1 for nearly greedy text."
        )
    exponent = 1 / temperature
    # 1 / 0.3333 or 1 / (1/3) should mean 3 draws, not 3 and a sliver.
    return float(round(exponent)) if abs(exponent - round(exponent)) < 1e-3 else exponent


def check_candidates(num_candidates: int, temperature: float) -> None:
    """Raises ValueError when so many candidates can never agree as often as the temperature asks."""
    needed = math.ceil(check_temperature(temperature))
    if num_candidates < needed:
        raise ValueError(
            f"num_candidates must be at least {needed} at temperature {temperature} (1/temperature draws have to "
            f"agree), got {num_candidates}: raise num_candidates or the temperature."
        )


def batch_temperature_sample(candidates: Tensor, temperature: float, generator: Generator = None) -> Tensor:
    """Choose one chunk per row out of N independent draws, approximately with probability ~ P(x)^(1/T).

    A chunk that occurs c >= 1/T times is chosen with weight c! / (c - 1/T)!. Where no chunk occurs often enough,
    1/T - 1 is tried, and so on; the last resort is a plain draw.

    Args:
        candidates: token ids ``[R, N, K]``.
        temperature: in (0, 1].

    Returns:
        token ids ``[R, K]``.
    """
    num_rows, num_candidates, patch_size = candidates.shape
    check_candidates(num_candidates, temperature)
    draws = Draws(
        lambda rows, count, _: candidates[rows, :count],
        lambda states, start, stop: states[:, start:stop],
        num_rows, patch_size, generator, candidates.device,
    )  # fmt: skip
    draws.draw(num_candidates)
    return _choose_by_counts(draws, check_temperature(temperature))


def sample_batch(draws: Draws, temperature: float, num_candidates: int) -> Tensor:
    """As :func:`batch_temperature_sample`, for N new draws, decoded as far as needed: ``[R, K]``."""
    check_candidates(num_candidates, temperature)
    exponent = check_temperature(temperature)
    whole = math.floor(exponent)
    remainder = exponent - whole
    width = whole + (_TRIALS if remainder else 0)
    # Which draw stands for a member of the urn is settled when the member is first looked at.
    place = torch.full((len(draws.rows), num_candidates), -1, device=draws.tokens.device)
    result = draws.tokens.new_zeros(len(draws.rows), draws.tokens.shape[2])
    attempted = 0
    for size in _URN_STEPS:
        attempts = size // width - attempted
        if attempts < 1 or 2 * size > num_candidates:
            continue
        attempted += attempts
        draws.draw(size - draws.count)
        members = draws.uniform(attempts, num_candidates).topk(width).indices  # [R, A, width]
        place = _give_places(place, members)
        slots = place.gather(1, members.flatten(1)).view_as(members)
        limit = _trial_limit(draws.uniform(1, attempts)[:, 0], remainder, num_candidates - whole)
        success, open_end = _attempt(draws, slots, whole, limit, torch.ones_like(limit, dtype=torch.bool))
        slot, limit, done, undecided = _first_to_end(slots, limit, success, open_end)
        if done.any():
            result[draws.rows[done]] = draws.part(done).chunks(slot[done])
        if undecided.any():
            rest = draws.part(undecided)
            result[rest.rows] = _settle(rest, slot[undecided], limit[undecided], exponent, num_candidates)
        going_on = ~(done | undecided)
        draws, place = draws.part(going_on), place[going_on]
        if len(draws.rows) == 0:
            return result
    draws.draw(num_candidates - draws.count)
    result[draws.rows] = _choose_by_counts(draws, exponent)
    return result


def sample_exact(draws: Draws, temperature: float, max_draws: int = 4096) -> tuple[Tensor, Tensor]:
    """Draw one chunk per row with probability exactly ~ P(x)^(1/T), for any 0 < T <= 1.

    Args:
        max_draws: the budget of a row. A row whose draws hardly ever agree spends it and stays unaccepted.

    Returns:
        ``(chunks [R, K], accepted [R] bool)``; rows with ``accepted = False`` hold nothing.
    """
    *_, last = exact_rounds(draws, temperature, max_draws)
    return last


def exact_rounds(draws: Draws, temperature: float, max_draws: int = 4096) -> Iterator[tuple[Tensor, Tensor]]:
    """Run :func:`sample_exact` round by round; a round has at most 64 draws of a row, or those of one attempt.

    Yields:
        the same two tensors after every round, updated in place; the last time all rows are accepted or the budget is
        spent.
    """
    exponent = check_temperature(temperature)
    whole = math.floor(exponent)
    remainder = exponent - whole
    width = whole + (_TRIALS if remainder else 0)
    result = draws.tokens.new_zeros(len(draws.rows), draws.tokens.shape[2])
    accepted = torch.zeros(len(draws.rows), dtype=torch.bool, device=draws.tokens.device)
    # A row in the middle of an attempt looks for this draw in so many further ones.
    sought = torch.zeros_like(draws.rows)
    to_go = torch.zeros_like(draws.rows)
    attempts = max(1, 8 // width)
    while draws.count + attempts * width <= max_draws and len(draws.rows) > 0:
        start = draws.count
        draws.draw(attempts * width)
        new = torch.arange(start, draws.count, device=sought.device).expand(len(sought), 1, -1)
        searching = to_go > 0
        found = torch.zeros_like(searching)
        if remainder:
            within = (torch.arange(new.shape[2], device=new.device) < to_go[:, None])[:, None]
            found = draws.equal(sought[:, None], new, within).any(-1)[:, 0]
            to_go = torch.where(found, 0, (to_go - new.shape[2]).clamp(min=0))

        slots = new.reshape(-1, attempts, width)
        limit = _trial_limit(draws.uniform(1, attempts)[:, 0], remainder, max_draws)
        success, open_end = _attempt(draws, slots, whole, limit, ~searching[:, None].expand_as(limit))
        slot, limit, succeeded, opened = _first_to_end(slots, limit, success, open_end)
        done = found | succeeded
        sought = torch.where(searching, sought, slot)
        to_go = torch.where(opened, limit - _TRIALS, to_go)
        if done.any():
            accepted[draws.rows[done]] = True
            result[draws.rows[done]] = draws.part(done).chunks(sought[done])
            draws, sought, to_go = draws.part(~done), sought[~done], to_go[~done]
        attempts = min(2 * attempts, max(1, _ROUND_LIMIT // width))
        yield result, accepted
    yield result, accepted


def _attempt(draws: Draws, slots: Tensor, whole: int, limit: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Which attempts succeed, and which run out of draws at hand: draws ``[R, A, width]`` -> two masks ``[R, A]``."""
    first, others, trials = slots[:, :, 0], slots[:, :, 1:whole], slots[:, :, whole:]
    agree = asked
    if whole > 1:
        agree = draws.equal(first, others, asked[:, :, None].expand_as(others), all_of_them=True).all(-1)
    if trials.shape[2] == 0:
        return agree, torch.zeros_like(agree)
    within = torch.arange(trials.shape[2], device=slots.device) < limit[:, :, None]
    found = draws.equal(first, trials, agree[:, :, None] & within).any(-1)
    return found, agree & ~found & (limit > trials.shape[2])


def _first_to_end(slots: Tensor, limit: Tensor, success: Tensor, open_end: Tensor) -> tuple[Tensor, ...]:
    """Of every row's first attempt that ended, if any did: its draw, its limit, and which of the two ends it was."""
    earliest = (success | open_end).long().argmax(1, keepdim=True)  # [R, 1]
    return tuple(each.gather(1, earliest)[:, 0] for each in (slots[:, :, 0], limit, success, open_end))


def _trial_limit(uniforms: Tensor, remainder: float, most: int) -> Tensor:
    """L of the Bernoulli factory, at most ``most``, from uniform random numbers."""
    if remainder == 0:
        return torch.zeros_like(uniforms, dtype=torch.long)
    i = torch.arange(1, most + 1, dtype=uniforms.dtype, device=uniforms.device)
    log_survival = torch.lgamma(i - remainder) - torch.lgamma(i) - math.lgamma(1 - remainder)
    return torch.searchsorted(-log_survival.exp(), -uniforms)


def _give_places(place: Tensor, members: Tensor) -> Tensor:
    """Draws for the members of the urn that have none yet: ``place [R, N]``, -1 where none; ``members [R, ...]``."""
    wanted = torch.zeros_like(place, dtype=torch.bool).scatter(1, members.flatten(1), True)
    new = wanted & (place < 0)
    taken = (place >= 0).sum(1, keepdim=True)
    return torch.where(new, taken + new.cumsum(1) - 1, place)


def _settle(draws: Draws, slot: Tensor, limit: Tensor, exponent: float, num_candidates: int) -> Tensor:
    """End attempts that found no copy of their chunk in the trials at hand, then sample: ``[R] -> [R, K]``."""
    draws.draw(num_candidates - draws.count)
    everything = torch.arange(num_candidates, device=slot.device).expand(len(slot), 1, -1)
    whole = math.floor(exponent)
    copies = draws.equal(slot[:, None], everything, torch.ones_like(everything, dtype=torch.bool)).sum((1, 2)) - whole
    # Of the others, _TRIALS were looked at in vain; the copies lie in random places of the rest.
    rest = num_candidates - whole - _TRIALS
    blanks, left = (each.to(finest(slot.device)) for each in (rest - copies, limit - _TRIALS))
    log_miss = torch.lgamma(blanks + 1) - torch.lgamma((blanks - left + 1).clamp(min=1))
    log_miss = log_miss - math.lgamma(rest + 1) + torch.lgamma(rest - left + 1)
    miss = torch.where(blanks >= left, log_miss.exp(), 0.0)
    found = draws.uniform(1)[:, 0] >= miss
    result = draws.tokens.new_zeros(len(slot), draws.tokens.shape[2])
    result[found] = draws.part(found).chunks(slot[found])
    result[~found] = _choose_by_counts(draws.part(~found), exponent)
    return result


def _choose_by_counts(draws: Draws, exponent: float) -> Tensor:
    """Choose among all draws, with weight c! / (c - exponent)! for a chunk that is there c times: ``[R, K]``.

    Where no chunk of a row is there ``exponent`` times, the exponent of that row is lowered by the least whole number
    that makes a chunk eligible, and down to a plain draw at most.
    """
    num_rows, count, patch_size = draws.tokens.shape
    result = draws.tokens.new_zeros(num_rows, patch_size)
    left = torch.arange(num_rows, device=result.device)
    most = torch.full_like(draws.tokens[:, :, 0], count)  # copies that a draw may have, by what of it is decoded
    while len(left) > 0:
        # No exponent between this one and the next that any row can reach needs a look; each has its random number.
        skipped = max(0, math.ceil(min(exponent - int(most.max()), exponent - 1)))
        if skipped:
            draws.uniform(skipped, 1)
            exponent -= skipped
        if exponent <= 1:
            chosen = (draws.uniform(1)[:, 0] * count).long()
            result[left] = draws.chunks(chosen)
            break
        alive = _count_copies(draws, most, exponent)
        copies = most.to(finest(most.device))
        # A chunk stands c times among the draws, so each copy carries 1/c of the chunk's weight.
        log_weight = torch.lgamma(copies + 1) - torch.lgamma((copies - exponent + 1).clamp(min=1e-9)) - copies.log()
        weight = (log_weight.masked_fill(~alive, -math.inf) - log_weight.masked_fill(~alive, 0).amax(1, True)).exp()
        cumulative = weight.cumsum(1)
        uniforms = draws.uniform(1) * cumulative[:, -1:]
        some = alive.any(1)
        if some.any():
            chosen = torch.searchsorted(cumulative[some], uniforms[some], right=True)[:, 0].clamp(max=count - 1)
            result[left[some]] = draws.part(some).chunks(chosen)
        draws, left, most = draws.part(~some), left[~some], most[~some]
        exponent -= 1
    return result


def _count_copies(draws: Draws, most: Tensor, exponent: float) -> Tensor:
    """Count the copies of all draws that may have ``exponent`` of them.

    Sorting finds copies in O(S log S). A draw that is too rare in its first tokens is too rare as a chunk, and is
    decoded no further.

    Args:
        most (``[R, S]``): upper bounds of the copies of every draw; lowered to what was counted.

    Returns:
        mask ``[R, S]`` of the draws that have ``exponent`` copies; for these ``most`` is exact.
    """
    alive = most >= exponent
    group = torch.zeros_like(most)  # draws that agree in all tokens so far have the same number
    for position in range(draws.tokens.shape[2]):
        token = draws.decode(alive, position)
        ordered, order = ((group << 32) + token).sort(1)
        is_new = ordered.diff(dim=1, prepend=ordered[:, :1]) != 0
        group = torch.zeros_like(group).scatter(1, order, is_new.cumsum(1))
        copies = torch.zeros_like(most).scatter_add(1, group, torch.ones_like(group)).gather(1, group)
        most.copy_(torch.where(alive, copies, most))
        alive = most >= exponent
    return alive
