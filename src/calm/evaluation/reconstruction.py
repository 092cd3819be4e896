"""How much text an autoencoder keeps."""

from dataclasses import asdict, dataclass

import torch

from calm.data.blocks import TokenBlocks
from calm.functional.gaussian import gaussian_kl_per_dimension
from calm.models.modeling_autoencoder import CalmAutoencoder

LIVE_VARIANCE = 0.01  # of the posterior mean over patches: below it a dimension says nothing (Burda et al., 2016)


@dataclass
class ReconstructionResult:
    """Shares (0 to 1) of tokens and patches that come back; the latent's use."""

    token_accuracy_mean: float  # decoded from the posterior mean
    token_accuracy_sample: float  # decoded from a draw of the posterior, as generation has it at best
    patch_accuracy_mean: float
    patch_accuracy_sample: float
    kl: float  # nats per patch, not floored
    live_dimensions: int
    latent_size: int
    num_tokens: int

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def evaluate_reconstruction(
    model: CalmAutoencoder, blocks: TokenBlocks, num_blocks: int | None = None, batch_size: int = 16, seed: int = 0
) -> ReconstructionResult:
    """Encode and decode blocks of text."""
    generator = torch.Generator(model.device).manual_seed(seed)
    model.eval()
    hits_mean, hits_sample, kl, means = [], [], [], []
    for batch in blocks.batches(num_blocks, batch_size):
        ids = batch.to(model.device)
        patches = ids.unflatten(1, (-1, model.config.patch_size))
        posterior = model.encode(ids)
        hits_mean.append(model.decode_tokens(posterior.mean) == patches)
        hits_sample.append(model.decode_tokens(posterior.sample(1, generator=generator)[0]) == patches)
        kl.append(gaussian_kl_per_dimension(posterior.mean, posterior.log_std).sum(-1))
        means.append(posterior.mean.flatten(0, 1).float())
    mean, sample = torch.cat(hits_mean), torch.cat(hits_sample)
    return ReconstructionResult(
        token_accuracy_mean=mean.float().mean().item(),
        token_accuracy_sample=sample.float().mean().item(),
        patch_accuracy_mean=mean.all(-1).float().mean().item(),
        patch_accuracy_sample=sample.all(-1).float().mean().item(),
        kl=torch.cat(kl).mean().item(),
        live_dimensions=int((torch.cat(means).var(0) > LIVE_VARIANCE).sum()),
        latent_size=model.config.latent_size,
        num_tokens=mean.numel(),
    )
