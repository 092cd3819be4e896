"""Sampling at a temperature when the model is only a sampler (the temperature sampling of the paper).

A likelihood-free model gives samples x ~ P, never P(x). A power of P comes from agreement: n independent samples
are all equal to x with probability P(x)^n.

With n = floor(1/T) and a = 1/T - n, an *attempt* takes n patches and fails unless all agree on x. If a > 0, it searches
for x once more in at most L further samples, where P(L >= i) = (1 - a/1) ... (1 - a/(i-1)), and fails if none is x.
This Bernoulli factory succeeds with probability P(x)^a, so the x of the first attempt that succeeds has probability
~ P(x)^(1/T).

- The *exact* sampler makes every attempt with new samples.
- The *batch* sampler makes its attempts with a candidate pool of N samples, without replacement within an attempt. That
  gives a patch that is c times in the pool the weight c! / (c - 1/T)!: where 1/T is whole, the number of n-subsets of
  samples that agree on it. It is consistent in N and costs at most N samples: when attempts keep failing, the whole
  pool is counted.

Where token probabilities are known, :func:`sharpened` applies a temperature and ``top_p`` to them.

Shapes: R rows (contexts), S samples of a row, A attempts, K tokens of a patch, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from calm.functional.lazy_samples import LazySamples
from calm.functional.rng import Generator, finest

# Logits are divided by at least this: the most likely token then has a probability of 1 up to rounding.
LOWEST_TEMPERATURE = 1e-6

# The candidate pool grows in steps: where the model is sure, a few samples decide.
_POOL_STEPS = (4, 16, 64)
_ROUND_LIMIT = 64  # samples of a row at once, exact sampler
_TRIALS = 3  # further samples that an attempt has at hand; more are rarely needed, and are taken then


def sharpened(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Return the probabilities of tokens to the power of 1 / temperature, ``[..., V]``, in float32.

    The most likely token keeps a finite probability at any temperature.

    Args:
        temperature: at least 0; 0 leaves the most likely token.
        top_p: in [0, 1]. Below 1 only the most likely tokens are kept, as few as have this probability together (after
            the temperature), and their probabilities are normalised. The most likely token is always kept.
    """
    logits = logits.float()
    if temperature != 1:
        logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, LOWEST_TEMPERATURE)
    probs = logits.softmax(-1)
    if top_p >= 1:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True)
    is_kept = ordered.cumsum(-1) - ordered < top_p  # the tokens before it do not have this probability yet
    is_kept[..., 0] = True
    probs = probs.masked_fill(~torch.zeros_like(is_kept).scatter(-1, order, is_kept), 0)
    return probs / probs.sum(-1, keepdim=True)


def largest(probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest probabilities and their tokens, in descending order: ``[..., V] -> [..., count]``.

    A vocabulary or shortlist of fewer tokens is filled up with token 0 of probability 0.
    """
    values, ids = probs.topk(min(count, probs.shape[-1]))
    missing = (0, count - values.shape[-1])
    return torch.nn.functional.pad(values, missing), torch.nn.functional.pad(ids, missing)


def check_known_temperature(temperature: float) -> None:
    """Raise ValueError when a temperature of known probabilities is negative or not a number."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 (0 chooses the most likely token), got {temperature}.")


def check_temperature(temperature: float) -> float:
    """Return 1 / temperature; raise ValueError when the temperature is not in (0, 1]."""
    if not 0 < temperature <= 1 or math.isinf(1 / temperature):
        raise ValueError(
            f"temperature must be in (0, 1], got {temperature}: comparing samples can sharpen a distribution, not "
            "flatten it, and never reaches 0. Use a small value such as 0.1 for nearly greedy text."
        )
    exponent = 1 / temperature
    # 1 / 0.3333 or 1 / (1/3) should mean 3 samples, not 3 and a small fraction.
    return float(round(exponent)) if abs(exponent - round(exponent)) < 1e-3 else exponent


def check_candidates(num_candidates: int, temperature: float) -> None:
    """Raise ValueError when this many candidates can never agree as often as the temperature requires."""
    needed = math.ceil(check_temperature(temperature))
    if num_candidates < needed:
        raise ValueError(
            f"num_candidates must be at least {needed} at temperature {temperature} (1/temperature samples have to "
            f"agree), got {num_candidates}: raise num_candidates or the temperature."
        )


def batch_temperature_sample(candidates: Tensor, temperature: float, generator: Generator = None) -> Tensor:
    """Choose one patch per row out of N independent samples, approximately with probability ~ P(x)^(1/T).

    A patch that occurs c >= 1/T times is chosen with weight c! / (c - 1/T)!. Where no patch occurs often enough,
    1/T - 1 is tried, and so on; the last resort is a plain sample.

    Args:
        candidates: token ids ``[R, N, K]``.
        temperature: in (0, 1].

    Returns:
        token ids ``[R, K]``.
    """
    num_rows, num_candidates, patch_size = candidates.shape
    check_candidates(num_candidates, temperature)
    samples = LazySamples(
        lambda rows, count, _: candidates[rows, :count],
        lambda states, start, stop: states[:, start:stop],
        num_rows, patch_size, generator, candidates.device,
    )  # fmt: skip
    samples.sample(num_candidates)
    return _choose_by_counts(samples, check_temperature(temperature))


def sample_batch(samples: LazySamples, temperature: float, num_candidates: int) -> Tensor:
    """Choose as :func:`batch_temperature_sample` among N new samples, decoded as far as needed: ``[R, K]``."""
    check_candidates(num_candidates, temperature)
    exponent = check_temperature(temperature)
    whole = math.floor(exponent)
    remainder = exponent - whole
    width = whole + (_TRIALS if remainder else 0)
    # Which sample a member of the pool is gets decided when the member is first needed.
    place = torch.full((len(samples.rows), num_candidates), -1, device=samples.tokens.device)
    result = samples.tokens.new_zeros(len(samples.rows), samples.tokens.shape[2])
    attempted = 0
    for size in _POOL_STEPS:
        attempts = size // width - attempted
        if attempts < 1 or 2 * size > num_candidates:
            continue
        attempted += attempts
        samples.sample(size - samples.count)
        members = samples.uniform(attempts, num_candidates).topk(width).indices  # [R, A, width]
        place = _give_places(place, members)
        slots = place.gather(1, members.flatten(1)).view_as(members)
        limit = _trial_limit(samples.uniform(1, attempts)[:, 0], remainder, num_candidates - whole)
        success, open_end = _attempt(samples, slots, whole, limit, torch.ones_like(limit, dtype=torch.bool))
        slot, limit, done, undecided = _first_to_end(slots, limit, success, open_end)
        if done.any():
            result[samples.rows[done]] = samples.part(done).patches(slot[done])
        if undecided.any():
            rest = samples.part(undecided)
            result[rest.rows] = _settle(rest, slot[undecided], limit[undecided], exponent, num_candidates)
        going_on = ~(done | undecided)
        samples, place = samples.part(going_on), place[going_on]
        if len(samples.rows) == 0:
            return result
    samples.sample(num_candidates - samples.count)
    result[samples.rows] = _choose_by_counts(samples, exponent)
    return result


def exact_rounds(samples: LazySamples, temperature: float, max_samples: int = 4096) -> Iterator[tuple[Tensor, Tensor]]:
    """Sample one patch per row with probability exactly ~ P(x)^(1/T), for any 0 < T <= 1, round by round.

    A round has at most 64 samples of a row, or those of one attempt, so that a server can serve others between rounds.

    Args:
        max_samples: the budget of a row. A row whose samples hardly ever agree spends it and is not accepted.

    Yields:
        ``(patches [R, K], accepted [R] bool)`` after every round, updated in place; rows with ``accepted = False`` have
        no patch. The last time all rows are accepted or the budget is spent.
    """
    exponent = check_temperature(temperature)
    whole = math.floor(exponent)
    remainder = exponent - whole
    width = whole + (_TRIALS if remainder else 0)
    result = samples.tokens.new_zeros(len(samples.rows), samples.tokens.shape[2])
    accepted = torch.zeros(len(samples.rows), dtype=torch.bool, device=samples.tokens.device)
    # A row in the middle of an attempt searches for this sample in `to_go` further ones.
    sought = torch.zeros_like(samples.rows)
    to_go = torch.zeros_like(samples.rows)
    attempts = max(1, 8 // width)
    while samples.count + attempts * width <= max_samples and len(samples.rows) > 0:
        start = samples.count
        samples.sample(attempts * width)
        new = torch.arange(start, samples.count, device=sought.device).expand(len(sought), 1, -1)
        searching = to_go > 0
        found = torch.zeros_like(searching)
        if remainder:
            within = (torch.arange(new.shape[2], device=new.device) < to_go[:, None])[:, None]
            found = samples.equal(sought[:, None], new, within).any(-1)[:, 0]
            to_go = torch.where(found, 0, (to_go - new.shape[2]).clamp(min=0))

        slots = new.reshape(-1, attempts, width)
        limit = _trial_limit(samples.uniform(1, attempts)[:, 0], remainder, max_samples)
        success, open_end = _attempt(samples, slots, whole, limit, ~searching[:, None].expand_as(limit))
        slot, limit, succeeded, opened = _first_to_end(slots, limit, success, open_end)
        done = found | succeeded
        sought = torch.where(searching, sought, slot)
        to_go = torch.where(opened, limit - _TRIALS, to_go)
        if done.any():
            accepted[samples.rows[done]] = True
            result[samples.rows[done]] = samples.part(done).patches(sought[done])
            samples, sought, to_go = samples.part(~done), sought[~done], to_go[~done]
        attempts = min(2 * attempts, max(1, _ROUND_LIMIT // width))
        yield result, accepted
    yield result, accepted


def _attempt(samples: LazySamples, slots: Tensor, whole: int, limit: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
    """Return which attempts succeed and which run out of samples: ``[R, A, width]`` -> two masks ``[R, A]``."""
    first, others, trials = slots[:, :, 0], slots[:, :, 1:whole], slots[:, :, whole:]
    agree = compared
    if whole > 1:
        agree = samples.equal(first, others, compared[:, :, None].expand_as(others), all_of_them=True).all(-1)
    if trials.shape[2] == 0:
        return agree, torch.zeros_like(agree)
    within = torch.arange(trials.shape[2], device=slots.device) < limit[:, :, None]
    found = samples.equal(first, trials, agree[:, :, None] & within).any(-1)
    return found, agree & ~found & (limit > trials.shape[2])


def _first_to_end(slots: Tensor, limit: Tensor, success: Tensor, open_end: Tensor) -> tuple[Tensor, ...]:
    """Return the sample, the limit and the two kinds of end of the first attempt of every row that ended."""
    earliest = (success | open_end).long().argmax(1, keepdim=True)  # [R, 1]
    return tuple(each.gather(1, earliest)[:, 0] for each in (slots[:, :, 0], limit, success, open_end))


def _trial_limit(uniforms: Tensor, remainder: float, most: int) -> Tensor:
    """Return L of the Bernoulli factory, at most ``most``, from uniform random numbers."""
    if remainder == 0:
        return torch.zeros_like(uniforms, dtype=torch.long)
    i = torch.arange(1, most + 1, dtype=uniforms.dtype, device=uniforms.device)
    log_survival = torch.lgamma(i - remainder) - torch.lgamma(i) - math.lgamma(1 - remainder)
    return torch.searchsorted(-log_survival.exp(), -uniforms)


def _give_places(place: Tensor, members: Tensor) -> Tensor:
    """Give samples to members of the pool that have none: ``place [R, N]``, -1 where none; ``members [R, ...]``."""
    wanted = torch.zeros_like(place, dtype=torch.bool).scatter(1, members.flatten(1), True)
    new = wanted & (place < 0)
    taken = (place >= 0).sum(1, keepdim=True)
    return torch.where(new, taken + new.cumsum(1) - 1, place)


def _settle(samples: LazySamples, slot: Tensor, limit: Tensor, exponent: float, num_candidates: int) -> Tensor:
    """End attempts that found no copy of their patch in the trials at hand, then sample: ``[R] -> [R, K]``."""
    samples.sample(num_candidates - samples.count)
    everything = torch.arange(num_candidates, device=slot.device).expand(len(slot), 1, -1)
    whole = math.floor(exponent)
    copies = samples.equal(slot[:, None], everything, torch.ones_like(everything, dtype=torch.bool)).sum((1, 2)) - whole
    # Of the others, _TRIALS were compared and differ; the copies are in random places of the rest.
    rest = num_candidates - whole - _TRIALS
    blanks, left = (each.to(finest(slot.device)) for each in (rest - copies, limit - _TRIALS))
    log_miss = torch.lgamma(blanks + 1) - torch.lgamma((blanks - left + 1).clamp(min=1))
    log_miss = log_miss - math.lgamma(rest + 1) + torch.lgamma(rest - left + 1)
    miss = torch.where(blanks >= left, log_miss.exp(), 0.0)
    found = samples.uniform(1)[:, 0] >= miss
    result = samples.tokens.new_zeros(len(slot), samples.tokens.shape[2])
    result[found] = samples.part(found).patches(slot[found])
    result[~found] = _choose_by_counts(samples.part(~found), exponent)
    return result


def _choose_by_counts(samples: LazySamples, exponent: float) -> Tensor:
    """Choose among all samples, with weight c! / (c - exponent)! for a patch that occurs c times: ``[R, K]``.

    Where no patch of a row occurs ``exponent`` times, the exponent of that row is lowered by the least whole number
    that makes a patch eligible, and down to a plain sample at most.
    """
    num_rows, count, patch_size = samples.tokens.shape
    result = samples.tokens.new_zeros(num_rows, patch_size)
    left = torch.arange(num_rows, device=result.device)
    most = torch.full_like(samples.tokens[:, :, 0], count)  # upper bound of copies
    while len(left) > 0:
        # Exponents that no row can reach are skipped; each still consumes its random number.
        skipped = max(0, math.ceil(min(exponent - int(most.max()), exponent - 1)))
        if skipped:
            samples.uniform(skipped, 1)
            exponent -= skipped
        if exponent <= 1:
            chosen = (samples.uniform(1)[:, 0] * count).long()
            result[left] = samples.patches(chosen)
            break
        alive = _count_copies(samples, most, exponent)
        copies = most.to(finest(most.device))
        # A patch occurs c times among the samples, so each copy carries 1/c of its weight.
        log_weight = torch.lgamma(copies + 1) - torch.lgamma((copies - exponent + 1).clamp(min=1e-9)) - copies.log()
        weight = (log_weight.masked_fill(~alive, -math.inf) - log_weight.masked_fill(~alive, 0).amax(1, True)).exp()
        cumulative = weight.cumsum(1)
        uniforms = samples.uniform(1) * cumulative[:, -1:]
        some = alive.any(1)
        if some.any():
            chosen = torch.searchsorted(cumulative[some], uniforms[some], right=True)[:, 0].clamp(max=count - 1)
            result[left[some]] = samples.part(some).patches(chosen)
        samples, left, most = samples.part(~some), left[~some], most[~some]
        exponent -= 1
    return result


def _count_copies(samples: LazySamples, most: Tensor, exponent: float) -> Tensor:
    """Count the copies of all samples that may have ``exponent`` of them.

    Sorting finds copies in O(S log S). A sample that is too rare in its first tokens is too rare as a patch, and is
    decoded no further.

    Args:
        most (``[R, S]``): upper bounds of the copies of every sample; lowered to the counts.

    Returns:
        mask ``[R, S]`` of the samples that have ``exponent`` copies; for these ``most`` is exact.
    """
    alive = most >= exponent
    group = torch.zeros_like(most)  # samples that agree in all tokens so far have the same number
    for position in range(samples.tokens.shape[2]):
        token = samples.decode(alive, position)
        ordered, order = ((group << 32) + token).sort(1)
        is_new = ordered.diff(dim=1, prepend=ordered[:, :1]) != 0
        group = torch.zeros_like(group).scatter(1, order, is_new.cumsum(1))
        copies = torch.zeros_like(most).scatter_add(1, group, torch.ones_like(group)).gather(1, group)
        most.copy_(torch.where(alive, copies, most))
        alive = most >= exponent
    return alive
