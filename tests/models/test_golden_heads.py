"""The diffusion and the flow head against tensors recorded from the reference implementation."""

import golden
import pytest
import torch

from calm.functional.diffusion import cosine_schedule, diffusion_loss, respace
from calm.functional.flow import flow_matching_loss


def targets_on_grid(eps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    grid = eps.new_zeros((eps.shape[0], *mask.shape, eps.shape[-1]))
    grid[:, mask] = eps
    return grid


def patch_mask(labels: torch.Tensor) -> torch.Tensor:
    return labels[:, 4:].ne(-100).unflatten(1, (-1, 4)).all(-1)


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Recorded ``[N * n, ...]`` values of the n target patches on the grid ``[N, B, L - 1, ...]``."""
    per_sample = values.unflatten(0, (-1, int(mask.sum())))
    grid = values.new_zeros((per_sample.shape[0], *mask.shape, *values.shape[1:]))
    grid[:, mask] = per_sample
    return grid


@pytest.mark.parametrize("name", ["flow_k4", "diffusion_k4"])
def test_network_matches_the_reference(name):
    model, io = golden.language_model(name), golden.load(f"{name}/io")
    time = io["net_t_quantised"] if "net_t_quantised" in io else io["net_t"]
    golden.close(model.head.network(io["net_x"], time, io["net_z"]), io["net_out"])


def test_flow_velocity_quantises_time_as_the_reference():
    model, io = golden.language_model("flow_k4"), golden.load("flow_k4/io")
    golden.close(model.head.velocity(io["net_x"], io["net_t"], io["net_z"]), io["net_out"])


@pytest.mark.parametrize(("solver", "steps"), [("midpoint", 10), ("euler", 20)])
def test_flow_trajectory_matches_the_reference(solver, steps):
    model = golden.language_model("flow_k4", solver=solver, num_sampling_steps=steps)
    io = golden.load("flow_k4/io")
    seen, velocity = [], model.head.velocity
    model.head.velocity = lambda x, time, hidden: seen.append((x, (time * 1000).long())) or velocity(x, time, hidden)
    latents = model.head.sample(io["net_z"], io["sample_x0"])
    assert [int(time) for _, time in seen] == io[f"sample_{solver}_net_t_quantised"].tolist()
    for (x, _), expected in zip(seen, io[f"sample_{solver}_net_inputs"], strict=True):
        golden.close(x, expected)
    golden.close(latents, io[f"sample_{solver}_final"])


def test_flow_loss_matches_the_reference():
    model, io = golden.language_model("flow_k4"), golden.load("flow_k4/io")
    time, noise, target = io["loss_t"], io["loss_x0"], io["loss_target"]
    x = (1 - time[:, None]) * noise + time[:, None] * target
    golden.close(flow_matching_loss(model.head.velocity(x, time, io["net_z"]), noise, target), io["loss_per_item"])


def test_schedules_match_the_reference():
    io = golden.load("diffusion_k4/io")
    for kind, schedule in (("train", cosine_schedule(1000)), ("gen", respace(cosine_schedule(1000), 100))):
        assert schedule.timesteps.tolist() == io[f"{kind}_timestep_map"].tolist()
        golden.close(schedule.betas, io[f"{kind}_betas"])
        golden.close(schedule.alphas_cumprod, io[f"{kind}_alphas_cumprod"])
        expected = io[f"{kind}_posterior_log_variance_clipped"].float()
        golden.close(schedule.posterior_log_variance, expected)


def test_diffusion_loss_matches_the_reference():
    model, io = golden.language_model("diffusion_k4"), golden.load("diffusion_k4/io")
    schedule, target, noise, step = cosine_schedule(1000), io["loss_target"], io["loss_noise"], io["loss_t"]
    noisy = schedule.signal[step][:, None] * target + schedule.noise[step][:, None] * noise
    mse, bound = diffusion_loss(model.head.network(noisy, step, io["net_z"]), target, noise, step, schedule)
    golden.close(mse, io["loss_mse"])
    golden.close(bound, io["loss_vb"])
    golden.close(mse + bound, io["loss_total"])


def test_diffusion_trajectory_matches_the_reference():
    model, io = golden.language_model("diffusion_k4"), golden.load("diffusion_k4/io")
    seen, network = [], model.head.network.forward
    model.head.network.forward = lambda x, time, hidden: seen.append(x) or network(x, time, hidden)
    noise = torch.cat([io["sample_noise0"][None], io["sample_step_noises"]])
    final = model.head.sample(io["net_z"], noise)
    for x, expected in zip([*seen[1:], final], io["sample_trajectory"], strict=True):
        golden.close(x, expected)  # relative to the scale of the step: a random network lets it grow to 1e4
    golden.close(final, io["sample_final"])


@pytest.mark.parametrize("name", ["flow_k4", "diffusion_k4"])
def test_training_forward_and_gradients_match_the_reference(name):
    model, io = golden.language_model(name), golden.load(f"{name}/io")
    mask = patch_mask(io["model_labels"])
    assert 0 < mask.sum() < mask.numel()  # some patches are no targets
    model.train()
    hidden = model(io["model_input_ids"]).last_hidden_state[:, :-1]
    posterior = model.autoencoder.encode(io["model_labels"][:, 4:].clamp(min=0))
    extra = {"time" if name == "flow_k4" else "timestep": masked(io["model_t"], mask)}
    noise = masked(io["model_x0" if name == "flow_k4" else "model_noise"], mask)
    losses = model.head.loss(hidden, posterior, noise, targets_on_grid(io["model_target_eps"], mask), **extra).loss
    loss = losses[mask].mean()
    golden.close(loss, io["model_loss"])
    loss.backward()
    expected = golden.rename(golden.load(f"{name}/grads"), model.config)
    trained = {each: parameter.grad for each, parameter in model.named_parameters() if parameter.requires_grad}
    assert expected.keys() == trained.keys()
    for each, gradient in expected.items():
        torch.testing.assert_close(trained[each], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
