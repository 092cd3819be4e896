"""Denoising diffusion of latent vectors: the cosine schedule, the loss with learned variance, the sampling steps.

A model's output for a noisy vector is ``[..., 2 Z]``: the predicted noise, and the position of the step's log-variance
between its two bounds (-1 and 1). Shapes: S steps of a schedule, Z latent, ... any leading dimensions. Sources: Ho
et al. 2020 (the process), Nichol and Dhariwal 2021 (cosine schedule, learned variance), Song et al. 2021 (DDIM).
"""

import math

import torch
from torch import Tensor

_MAX_BETA = 0.999
_HALF_BIN = 1 / 255  # half a bin of the discretised likelihood at the last step, as for images in [-1, 1]


class DiffusionSchedule:
    """The tables of a diffusion process, one entry per step, from the cleanest step to the noisiest.

    They are computed in float64 and stored in float32.

    Args:
        timesteps: ``[S]``, numbers of the steps in the process that the model was trained on.
        betas: ``[S]`` in float64, the variance that each step adds.
        device: device of the tables.
    """

    def __init__(self, timesteps: Tensor, betas: Tensor, device: torch.device | str = "cpu"):
        share = (1 - betas).cumprod(0)  # share of the signal's variance that is left after the step
        before = torch.cat([share.new_ones(1), share[:-1]])
        posterior_variance = betas * (1 - before) / (1 - share)  # of x_{t-1} given x_t and x_0
        # The variance of the first step is 0, which has no logarithm: that of the second step is used.
        after_first = posterior_variance[1:] if len(betas) > 1 else betas
        posterior_variance = torch.cat([after_first[:1], posterior_variance[1:]])

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)

        self.timesteps = timesteps.to(device)
        self.betas, self.alphas_cumprod = betas, share
        # x_t = signal * x_0 + noise * e, and the same one step earlier
        self.signal, self.noise = table(share.sqrt()), table((1 - share).sqrt())
        self.signal_before, self.noise_before = table(before.sqrt()), table((1 - before).sqrt())
        # x_0 = inverse_signal * x_t - inverse_noise * e
        self.inverse_signal, self.inverse_noise = table(share.rsqrt()), table((1 / share - 1).sqrt())
        # mean of x_{t-1} given x_t and x_0 = of_clean * x_0 + of_noisy * x_t
        self.of_clean = table(betas * before.sqrt() / (1 - share))
        self.of_noisy = table((1 - before) * (1 - betas).sqrt() / (1 - share))
        self.log_beta, self.posterior_log_variance = table(betas.log()), table(posterior_variance.log())

    def __len__(self) -> int:
        return len(self.betas)


def cosine_schedule(num_timesteps: int, device: torch.device | str = "cpu") -> DiffusionSchedule:
    """Return the schedule of Nichol and Dhariwal: the share of the signal falls as a squared cosine."""

    def signal(step: int) -> float:
        return math.cos((step / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - signal(step + 1) / signal(step), _MAX_BETA) for step in range(num_timesteps)]
    return DiffusionSchedule(torch.arange(num_timesteps), torch.tensor(betas, dtype=torch.float64), device)


def respace(schedule: DiffusionSchedule, num_steps: int) -> DiffusionSchedule:
    """Return the same process in fewer, evenly spaced steps, with its first and last step.

    Raises:
        ValueError: when ``num_steps`` is not between 1 and the schedule's length.
    """
    length = len(schedule)
    if not 1 <= num_steps <= length:
        raise ValueError(f"num_sampling_steps must be between 1 and the {length} training steps, got {num_steps}.")
    if num_steps == 1:
        kept = [length - 1]  # a single step starts from pure noise
    else:
        stride = (length - 1) / (num_steps - 1)
        kept = [round(step * stride) for step in range(num_steps)]
    chosen = schedule.alphas_cumprod[kept]
    before = torch.cat([chosen.new_ones(1), chosen[:-1]])
    return DiffusionSchedule(schedule.timesteps[kept], 1 - chosen / before, schedule.timesteps.device)


def add_noise(clean: Tensor, noise: Tensor, step: Tensor, schedule: DiffusionSchedule) -> Tensor:
    """Return the noisy vector of a step, ``[..., Z]``; ``step [...]`` is an index into the schedule."""
    return _at(schedule.signal, step) * clean + _at(schedule.noise, step) * noise


def diffusion_loss(
    output: Tensor, clean: Tensor, noise: Tensor, step: Tensor, schedule: DiffusionSchedule
) -> tuple[Tensor, Tensor]:
    """Compute the two parts of the training loss, each ``[...]``, means over Z.

    Args:
        output: output of the model for ``add_noise(clean, noise, step, schedule)``, ``[..., 2 Z]``.
        clean, noise: ``[..., Z]``.
        step: ``[...]``.

    Returns:
        squared error of the predicted noise, and the variational bound in bits, whose gradient reaches the variance
        only (at the first step the likelihood of the discretised clean vector, at others the KL divergence to the true
        posterior).
    """
    noise_prediction = output.chunk(2, dim=-1)[0]
    mse = (noise_prediction - noise).square().mean(-1)

    noisy = add_noise(clean, noise, step, schedule)
    frozen = torch.cat([noise_prediction.detach(), output.chunk(2, dim=-1)[1]], dim=-1)
    mean, log_variance = _reverse_step(frozen, noisy, step, schedule)
    true_mean = _posterior_mean(clean, noisy, step, schedule)
    true_log_variance = _at(schedule.posterior_log_variance, step)
    kl = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    surprise = torch.where((step == 0)[..., None], _discretised_surprise(clean, mean, 0.5 * log_variance), kl)
    return mse, surprise.mean(-1) / math.log(2)


def ancestral_step(
    output: Tensor,
    noisy: Tensor,
    step: Tensor,
    schedule: DiffusionSchedule,
    noise: Tensor,
    clip: float | None = None,
) -> Tensor:
    """Sample the vector of the next, less noisy step, ``[..., Z]``, with the learned variance.

    The last step adds no noise.

    Args:
        clip: bound of the entries of the estimated clean vector; default none. In the noisiest steps, where hardly any
            signal is left, the estimate multiplies an error of the predicted noise by ten thousand.
    """
    mean, log_variance = _reverse_step(output, noisy, step, schedule, clip)
    return mean + (step > 0)[..., None] * (0.5 * log_variance).exp() * noise


def ddim_step(
    output: Tensor, noisy: Tensor, step: Tensor, schedule: DiffusionSchedule, clip: float | None = None
) -> Tensor:
    """Return the next, less noisy vector on the deterministic path; arguments as in :func:`ancestral_step`."""
    noise_prediction = output.chunk(2, dim=-1)[0]
    clean = _clean(noise_prediction, noisy, step, schedule, clip)
    if clip is not None:  # the noise that belongs to the bounded vector
        noise_prediction = (_at(schedule.inverse_signal, step) * noisy - clean) / _at(schedule.inverse_noise, step)
    return _at(schedule.signal_before, step) * clean + _at(schedule.noise_before, step) * noise_prediction


def _at(table: Tensor, step: Tensor) -> Tensor:
    """Return entries of a table in the shape of a factor of vectors: ``[...] -> [..., 1]``."""
    return table.take(step)[..., None]  # indexing by a single number, as in sampling, would wait for the device


def _clean(
    noise_prediction: Tensor, noisy: Tensor, step: Tensor, schedule: DiffusionSchedule, clip: float | None
) -> Tensor:
    """Return the estimate of ``x_0``."""
    clean = _at(schedule.inverse_signal, step) * noisy - _at(schedule.inverse_noise, step) * noise_prediction
    return clean if clip is None else clean.clamp(-clip, clip)


def _posterior_mean(clean: Tensor, noisy: Tensor, step: Tensor, schedule: DiffusionSchedule) -> Tensor:
    """Return the mean of ``x_{t-1}`` given ``x_t`` and ``x_0``."""
    return _at(schedule.of_clean, step) * clean + _at(schedule.of_noisy, step) * noisy


def _reverse_step(
    output: Tensor, noisy: Tensor, step: Tensor, schedule: DiffusionSchedule, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of the model's ``x_{t-1}`` given ``x_t``."""
    noise_prediction, variance = output.chunk(2, dim=-1)
    upper, lower = _at(schedule.log_beta, step), _at(schedule.posterior_log_variance, step)
    share = (variance + 1) / 2
    mean = _posterior_mean(_clean(noise_prediction, noisy, step, schedule, clip), noisy, step, schedule)
    return mean, share * upper + (1 - share) * lower


def _discretised_surprise(clean: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return minus the log-probability of the bin around ``clean`` in nats; the outermost bins are open."""
    centred, inverse_std = clean - mean, (-log_std).exp()
    above = _normal_cdf(inverse_std * (centred + _HALF_BIN))
    below = _normal_cdf(inverse_std * (centred - _HALF_BIN))
    probability = torch.where(clean < -0.999, above, torch.where(clean > 0.999, 1 - below, above - below))
    return -probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Approximate the distribution function of the standard normal."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))).tanh())
