import golden
import pytest
import torch
import torch.nn.functional as F

from calm.functional import gaussian_kl
from calm.functional.gaussian import gaussian_kl_per_dimension

PATCH_SIZES = [1, 4]


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_encode_and_decode_match_the_reference(patch_size):
    model, io = golden.autoencoder(patch_size), golden.load(f"autoencoder_k{patch_size}/io")
    posterior = model.encode(io["input_ids"])
    golden.close(posterior.mean, io["mean"])
    golden.close(posterior.log_std, io["log_std"])
    golden.close(model.decode(io["latent"]).flatten(1, 2), io["logits"])
    golden.close(model.decode(io["mean"]).flatten(1, 2), io["eval_logits_at_mean"])
    assert torch.equal(model.decode_tokens(io["latent"]).flatten(1), io["logits"].argmax(-1))


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_kl_matches_the_reference(patch_size):
    io = golden.load(f"autoencoder_k{patch_size}/io")
    golden.close(gaussian_kl_per_dimension(io["mean"], io["log_std"]), io["kl_unclamped"])
    golden.close(gaussian_kl(io["mean"], io["log_std"], clip=0.5), io["kl_clamped"].sum(-1))
    golden.close(gaussian_kl(io["mean"], io["log_std"], clip=0.5).mean(), io["kl_loss"])


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_forward_matches_the_reference_for_given_noise(patch_size):
    model, io = golden.autoencoder(patch_size), golden.load(f"autoencoder_k{patch_size}/io")
    output = model(io["input_ids"], labels=io["input_ids"], noise=io["eval_eps"].view(3, 4, 16))
    logits = model(io["input_ids"], noise=io["eval_eps"].view(3, 4, 16)).logits
    golden.close(logits.flatten(0, 2), io["eval_logits"])
    golden.close(output.reconstruction_loss, io["eval_loss"])
    golden.close(output.loss, patch_size * io["eval_loss"] + 1e-3 * io["kl_loss"])


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_training_loss_and_gradients_match_the_reference(patch_size):
    model, io = golden.autoencoder(patch_size), golden.load(f"autoencoder_k{patch_size}/io")
    ids = io["input_ids"]
    # The training forward with the recorded dropout masks in place of random ones.
    kept = ids * io["train_token_keep"].view_as(ids)
    posterior = model.encode(kept)
    latents = posterior.sample(1, io["eval_eps"].view(1, 3, 4, 16))[0]
    logits = model.decode(latents * io["train_latent_keep"].view(3, 4, 16) / 0.85)
    golden.close(logits.flatten(0, 2), io["train_logits_fp32"])
    cross_entropy = F.cross_entropy(logits.flatten(0, 2), ids.flatten())
    loss = patch_size * cross_entropy + 1e-3 * gaussian_kl(posterior.mean, posterior.log_std).mean()
    golden.close(loss, io["train_loss_fp32"])
    loss.backward()
    expected = golden.rename(golden.load(f"autoencoder_k{patch_size}/grads"), model.config)
    parameters = dict(model.named_parameters())
    assert expected.keys() == parameters.keys()
    for name, gradient in expected.items():
        golden.close(parameters[name].grad, gradient)
