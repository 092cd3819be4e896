"""How much text an autoencoder keeps."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from calm.data.blocks import TokenBlocks
from calm.functional.gaussian import gaussian_kl_per_dimension
from calm.models.modeling_autoencoder import CalmAutoencoder

LIVE_VARIANCE = 0.01  # of the posterior mean over patches: below it a dimension says nothing (Burda et al., 2016)
NOISE = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass
class ReconstructionResult:
    """Shares (0 to 1) of tokens and patches that come back; the latent's use."""

    token_accuracy_mean: float  # decoded from the posterior mean
    token_accuracy_sample: float  # decoded from a draw of the posterior, as generation has it at best
    patch_accuracy_mean: float
    patch_accuracy_sample: float
    # Of tokens decoded from the posterior mean plus normal noise of this scale: how far a language model may miss.
    token_accuracy_with_noise: dict[str, float]
    kl: float  # nats per patch, not floored
    posterior_std: float  # mean over patches and dimensions
    live_dimensions: int
    latent_size: int
    num_tokens: int

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def evaluate_reconstruction(
    model: CalmAutoencoder,
    blocks: TokenBlocks,
    num_blocks: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> ReconstructionResult:
    """Encode and decode blocks of text; ``advance`` is called with the number of blocks after every batch."""
    generator = torch.Generator(model.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    hits_mean, hits_sample, kl, std, means = [], [], [], [], []
    hits_noise: dict[float, list[torch.Tensor]] = {scale: [] for scale in NOISE}
    for batch in blocks.batches(num_blocks, batch_size):
        ids = batch.to(model.device)
        patches = ids.unflatten(1, (-1, model.config.patch_size))
        posterior = model.encode(ids)
        mean = posterior.mean
        hits_mean.append(model.decode_tokens(mean) == patches)
        hits_sample.append(model.decode_tokens(posterior.sample(1, generator=generator)[0]) == patches)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device).to(mean.dtype)
        for scale, hits in hits_noise.items():
            hits.append((model.decode_tokens(mean + scale * noise) == patches).float().mean(dim=(1, 2)))
        kl.append(gaussian_kl_per_dimension(mean, posterior.log_std).sum(-1))
        std.append(posterior.log_std.float().exp().mean((1, 2)))
        means.append(mean.flatten(0, 1).float())
        if advance is not None:
            advance(len(ids))
    model.train(was_training)
    from_mean, from_sample = torch.cat(hits_mean), torch.cat(hits_sample)
    return ReconstructionResult(
        token_accuracy_mean=from_mean.float().mean().item(),
        token_accuracy_sample=from_sample.float().mean().item(),
        patch_accuracy_mean=from_mean.all(-1).float().mean().item(),
        patch_accuracy_sample=from_sample.all(-1).float().mean().item(),
        token_accuracy_with_noise={str(scale): torch.cat(hits).mean().item() for scale, hits in hits_noise.items()},
        kl=torch.cat(kl).mean().item(),
        posterior_std=torch.cat(std).mean().item(),
        live_dimensions=int((torch.cat(means).var(0) > LIVE_VARIANCE).sum()),
        latent_size=model.config.latent_size,
        num_tokens=from_mean.numel(),
    )
