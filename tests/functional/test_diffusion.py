import pytest
import torch

from calm.functional.diffusion import add_noise, ancestral_step, cosine_schedule, ddim_step, diffusion_loss, respace

SCALE = 0.6


def perfect_noise_prediction(x, step, schedule):
    """Of data N(0, SCALE^2): the expected noise in x_t is known in closed form."""
    signal, noise = schedule.signal[step], schedule.noise[step]
    return noise * x / (signal**2 * SCALE**2 + noise**2)


@pytest.mark.parametrize("num_steps", [50, 1000])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_a_perfect_model_gives_back_the_gaussian_it_knows(sampler, num_steps):
    schedule = respace(cosine_schedule(1000), num_steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=generator)
    for index in reversed(range(num_steps)):
        step = torch.tensor(index)
        # Variance output 0: half-way between the bounds on a log scale.
        output = torch.cat([perfect_noise_prediction(x, step, schedule), torch.zeros_like(x)], dim=-1)
        if sampler == "ddim":
            x = ddim_step(output, x, step, schedule)
        else:
            x = ancestral_step(output, x, step, schedule, torch.randn(x.shape, generator=generator))
    assert abs(x.std().item() - SCALE) < 0.04
    assert abs(x.mean().item()) < 0.05


def test_respacing_keeps_the_ends_and_the_signal():
    full = cosine_schedule(1000)
    assert respace(full, 1000).timesteps.tolist() == list(range(1000))
    for num_steps in (2, 7, 100):
        some = respace(full, num_steps)
        assert (some.timesteps[0], some.timesteps[-1]) == (0, 999)
        torch.testing.assert_close(some.alphas_cumprod, full.alphas_cumprod[some.timesteps])
    assert respace(full, 1).timesteps.tolist() == [999]
    with pytest.raises(ValueError, match="between 1 and the 1000 training steps, got 1001"):
        respace(full, 1001)


def test_noise_grows_from_almost_none_to_almost_all():
    schedule = cosine_schedule(1000)
    clean, noise = torch.full((2, 3), 5.0), torch.full((2, 3), -1.0)
    ends = add_noise(clean, noise, torch.tensor([0, 999]), schedule)
    torch.testing.assert_close(ends[0], clean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(ends[1], noise[1], atol=0.05, rtol=0)


def test_the_bound_trains_the_variance_alone():
    schedule, step = cosine_schedule(1000), torch.tensor([0, 10, 500])
    output = torch.randn(3, 8, requires_grad=True)
    diffusion_loss(output, torch.randn(3, 4), torch.randn(3, 4), step, schedule)[1].sum().backward()
    assert output.grad[:, :4].abs().max() == 0
    assert output.grad[:, 4:].abs().min() > 0


def test_the_bound_is_zero_for_the_true_posterior():
    """With the right noise and the smaller variance the model's step is the true one."""
    schedule, step = cosine_schedule(1000), torch.tensor([3, 400, 900])
    clean, noise = torch.randn(3, 4), torch.randn(3, 4)
    output = torch.cat([noise, torch.full((3, 4), -1.0)], dim=-1)
    mse, bound = diffusion_loss(output, clean, noise, step, schedule)
    torch.testing.assert_close(mse, torch.zeros(3))
    torch.testing.assert_close(bound, torch.zeros(3), atol=1e-3, rtol=0)
