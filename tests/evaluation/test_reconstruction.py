"""Reconstruction scores, recounted patch by patch on text of three words."""

import pytest
import tiny
import torch
from test_brier_lm import Blocks

from calm.evaluation.reconstruction import NOISE, evaluate_reconstruction


@torch.no_grad()
def recounted(model, patches, latents):
    """Shares of tokens and of whole patches that latents ``[patches, Z]`` decode to, one patch at a time."""
    tokens = whole = 0
    for patch, latent in zip(patches, latents, strict=True):
        best = [int(logits.argmax()) for logits in model.decode(latent)]
        hits = [token == other for token, other in zip(best, patch.tolist(), strict=True)]
        tokens, whole = tokens + sum(hits), whole + all(hits)
    return tokens / patches.numel(), whole / len(patches)


@torch.no_grad()
def test_shares_are_those_of_patches_counted_one_by_one():
    model, ids = tiny.autoencoder(2, vocab_size=3), torch.randint(3, (6, 40))
    result = evaluate_reconstruction(model, Blocks(ids, 3), batch_size=6, seed=4)
    patches = ids.reshape(-1, 2)
    posterior = model.encode(ids)
    mean, std = posterior.mean.flatten(0, 1), posterior.log_std.exp().flatten(0, 1)
    shares = recounted(model, patches, mean)
    assert (result.token_accuracy_mean, result.patch_accuracy_mean) == pytest.approx(shares)
    assert 0 < result.patch_accuracy_mean < result.token_accuracy_mean < 1
    generator = torch.Generator().manual_seed(4)
    sample = mean + std * torch.randn((1, 6, 20, 8), generator=generator).view(-1, 8)
    shares = recounted(model, patches, sample)
    assert (result.token_accuracy_sample, result.patch_accuracy_sample) == pytest.approx(shares)
    noise = torch.randn((6, 20, 8), generator=generator).view(-1, 8)
    for scale in NOISE:
        share = recounted(model, patches, mean + scale * noise)[0]
        assert result.token_accuracy_with_noise[str(scale)] == pytest.approx(share, abs=1e-6)
    kl = (std.square() + mean.square() - 1 - 2 * std.log()).sum(1) / 2
    assert result.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert result.posterior_std == pytest.approx(std.mean().item(), rel=1e-5)
    assert (result.num_tokens, result.latent_size) == (240, 8)


@torch.no_grad()
def test_a_certain_posterior_keeps_what_its_mean_keeps_and_noise_of_any_size_loses_it():
    """Where the posterior has one deviation throughout, the result gives it; near 0 a sample is the mean."""
    model, blocks = tiny.autoencoder(2, vocab_size=3), Blocks(torch.randint(3, (6, 40)), 3)
    last = model.encoder.to_posterior
    last.weight[8:], last.bias[8:] = 0, -12.0
    result = evaluate_reconstruction(model, blocks)
    assert result.posterior_std == pytest.approx(torch.tensor(-12.0).exp().item(), rel=1e-5)
    assert result.token_accuracy_sample == result.token_accuracy_mean
    assert result.patch_accuracy_sample == result.patch_accuracy_mean
    # Half of the latents' dimensions say nothing.
    last.weight[:4], last.bias[:4] = 0, 0.7
    assert evaluate_reconstruction(model, blocks).live_dimensions <= 4
