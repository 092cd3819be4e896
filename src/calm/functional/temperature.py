"""Sampling at a temperature when the model is only a sampler (the paper's temperature sampling).

A likelihood-free model gives draws x ~ P, never P(x). A power of P comes from agreement: n independent draws
are all equal to x with probability P(x)^n.

Shapes: B rows (contexts), N candidates of a row, K tokens of a chunk.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def check_temperature(temperature: float) -> float:
    """Returns 1 / temperature, or raises ValueError when the temperature is not in (0, 1]."""
    if not 0 < temperature <= 1:
        raise ValueError(
            f"temperature must lie in (0, 1], got {temperature}: draws of the model can be sharpened, not flattened; "
            "take a small value such as 0.1 for nearly greedy text."
        )
    exponent = 1 / temperature
    # 1 / 0.3333 or 1 / (1/3) should mean 3 draws, not 3 and a sliver.
    return float(round(exponent)) if abs(exponent - round(exponent)) < 1e-3 else exponent


def batch_temperature_sample(
    candidates_BNK: Tensor, temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """Choose one chunk per row out of N independent draws, approximately with probability ~ P(x)^(1/T).

    With n = 1/T, a chunk that occurs c >= n times is chosen with weight C(c, n), the number of n-subsets of draws
    that agree on it. Where no chunk occurs n times, n - 1 is tried, and so on; the last resort n = 1 is a plain draw.
    Consistent in N; for whole 1/T the expected weight is exactly proportional to P(x)^n. For other temperatures the
    binomial coefficient is continued with the gamma function.

    Args:
        candidates_BNK: token ids ``[B, N, K]``.
        temperature: in (0, 1].

    Returns:
        token ids ``[B, K]``.
    """
    exponent = check_temperature(temperature)
    num_candidates = candidates_BNK.shape[1]
    if num_candidates < exponent:
        raise ValueError(
            f"temperature {temperature} needs at least {math.ceil(exponent)} candidates to agree, got num_candidates="
            f"{num_candidates}: raise num_candidates or the temperature."
        )
    if exponent == 1:
        return candidates_BNK[:, 0]

    agree_BNN = (candidates_BNK[:, :, None] == candidates_BNK[:, None]).all(-1)
    count_BN = agree_BNN.sum(-1).double()
    # n, n - 1, ... down to 1, per row the first that some chunk reaches.
    reachable = count_BN.amax(-1)
    shortfall = (exponent - reachable).clamp(min=0).ceil()
    n_B1 = (exponent - shortfall).clamp(min=1)[:, None]
    log_weight = torch.lgamma(count_BN + 1) - torch.lgamma((count_BN - n_B1 + 1).clamp(min=1e-9))
    # A chunk stands c times among the candidates, so each copy carries 1/c of the chunk's weight.
    log_weight = torch.where(count_BN >= n_B1, log_weight - count_BN.log(), -math.inf)
    chosen_B = torch.multinomial(log_weight.softmax(-1), 1, generator=generator)
    return candidates_BNK.gather(1, chosen_B[:, :, None].expand(-1, 1, candidates_BNK.shape[2]))[:, 0]


def exact_temperature_sample(
    draw: Callable[[Tensor, int], Tensor],
    num_rows: int,
    temperature: float,
    generator: torch.Generator | None = None,
    draws_per_round: int = 64,
    max_draws: int = 4096,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one chunk per row with probability exactly ~ P(x)^(1/T), for any 0 < T <= 1.

    With n = floor(1/T) and a = 1/T - n: draw n chunks, start again unless all agree on x*; accept x* if a = 0;
    else, for i = 1, 2, ...: draw once more, accept x* if the draw equals it, otherwise start again with probability
    a / i. (The second stage is a Bernoulli factory: it accepts with probability P(x*)^a.)

    Args:
        draw: ``draw(rows, count)`` gives ``[len(rows), count, K]`` independent chunks of the rows (int64 indices).
        num_rows: B.
        temperature: in (0, 1].
        draws_per_round: draws asked for at once and per row; changes the speed, not the law.
        max_draws: the budget of a row. A row whose draws hardly ever agree spends it and stays unaccepted.

    Returns:
        ``(chunks [B, K], accepted [B] bool, num_draws [B])``; rows with ``accepted = False`` hold their last draw.
    """
    exponent = check_temperature(temperature)
    whole = math.floor(exponent)
    remainder = exponent - whole

    rows = torch.arange(num_rows, device=device)
    agreed = torch.zeros(num_rows, dtype=torch.long, device=device)  # draws that agree so far, at most `whole`
    tries = torch.zeros(num_rows, dtype=torch.long, device=device)  # i of the second stage
    accepted = torch.zeros(num_rows, dtype=torch.bool, device=device)
    num_draws = torch.zeros(num_rows, dtype=torch.long, device=device)
    result: Tensor | None = None

    drawn = 0
    while drawn < max_draws and len(rows) > 0:
        count = min(draws_per_round, max_draws - drawn)
        chunks = draw(rows, count)
        if result is None:
            result = chunks.new_zeros(num_rows, chunks.shape[-1])
        restart_luck = torch.rand(len(rows), count, generator=generator, device=device, dtype=torch.float64)
        held, done = result[rows], accepted[rows]
        agree, attempt, used = agreed[rows], tries[rows], num_draws[rows]
        for step in range(count):
            chunk = chunks[:, step]
            same = (chunk == held).all(-1)
            in_second_stage = agree == whole
            used = torch.where(done, used, used + 1)

            # First stage: a draw that disagrees starts the run of n anew. It is not kept as the first of the new
            # run: the run before it would then have been ended by it, and the restart would not be independent.
            first = agree == 0
            held = torch.where((first & ~done)[:, None], chunk, held)
            first_agree = torch.where(first, 1, torch.where(same, agree + 1, 0))
            complete = first_agree == whole
            # Second stage.
            attempt = torch.where(in_second_stage & ~done, attempt + 1, attempt)
            restart = in_second_stage & ~same & (restart_luck[:, step] * attempt < remainder)
            agree = torch.where(done, agree, torch.where(in_second_stage, agree, first_agree))
            agree = torch.where(restart & ~done, 0, agree)
            attempt = torch.where(restart & ~done, 0, attempt)
            done = done | (in_second_stage & same) | (~in_second_stage & complete & (remainder == 0))
        result[rows], accepted[rows] = held, done
        agreed[rows], tries[rows], num_draws[rows] = agree, attempt, used
        rows = rows[~done]
        drawn += count
    assert result is not None
    return result, accepted, num_draws
