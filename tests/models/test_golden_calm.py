import golden
import pytest
import torch

from calm.functional import energy_score, gaussian_sample
from calm.models.modeling_autoencoder import Posterior

PATCH_SIZES = [1, 4]


def on_grid(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of the n target patches ``[N, n, ...]`` on the full grid ``[N, B, L - 1, ...]``, zero elsewhere."""
    grid = values.new_zeros((values.shape[0], *mask.shape, *values.shape[2:]))
    grid[:, mask] = values
    return grid


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_hidden_states_match_the_reference(patch_size):
    model, io = golden.language_model(f"energy_k{patch_size}"), golden.load(f"energy_k{patch_size}/io")
    embedded = model.embed_patches(io["input_ids"])
    golden.close(embedded[:, :-1], io["inputs_embeds"])
    golden.close(model(io["input_ids"]).last_hidden_state[:, :-1], io["hidden_states"])


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_head_matches_the_reference_for_given_noise(patch_size):
    model, io = golden.language_model(f"energy_k{patch_size}"), golden.load(f"energy_k{patch_size}/io")
    golden.close(model.head.sample(io["head_hidden"], io["head_noise"]), io["head_out"])
    golden.close(model.head.sample(io["hidden_states_masked"], io["noise"]), io["latents"])


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_energy_score_matches_the_reference(patch_size, alpha):
    io = golden.load(f"energy_k{patch_size}/io")
    suffix = f"beta{alpha:g}"
    targets = gaussian_sample(io["es_mean"], io["es_log_std"], 100, io["es_eps"])
    golden.close(energy_score(io["es_x"], targets, alpha), io[f"es_score_{suffix}"])
    targets = Posterior(io["ae_mean"], io["ae_log_std"]).sample(100, io["eps"])
    golden.close(energy_score(io["latents"], targets, alpha), io[f"energy_score_{suffix}"])


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_loss_matches_the_reference_with_masked_patches(patch_size, alpha):
    model, io = golden.language_model(f"energy_k{patch_size}", alpha=alpha), golden.load(f"energy_k{patch_size}/io")
    mask = io["patch_mask"].bool()
    output = model(
        io["input_ids"], labels=io["labels"], noise=on_grid(io["noise"], mask), target_noise=on_grid(io["eps"], mask)
    )
    golden.close(output.loss, io[f"loss_beta{alpha:g}"])
    golden.close(output.metrics["energy_score"], -io[f"loss_beta{alpha:g}"])


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_gradients_match_the_reference(patch_size):
    model, io = golden.language_model(f"energy_k{patch_size}"), golden.load(f"energy_k{patch_size}/io")
    mask = io["patch_mask"].bool()
    model.train()
    model(
        io["input_ids"], labels=io["labels"], noise=on_grid(io["noise"], mask), target_noise=on_grid(io["eps"], mask)
    ).loss.backward()
    expected = golden.rename(golden.load(f"energy_k{patch_size}/grads"), model.config)
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert expected.keys() == trained.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(trained[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
