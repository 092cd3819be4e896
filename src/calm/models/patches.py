"""Patches of K tokens: splitting, masks, and the input of the backbone.

Shapes: B batch, T = L * K tokens, L patches, K tokens of a patch, D hidden.
"""

from torch import Tensor, nn


def split_patches(input_ids: Tensor, patch_size: int) -> Tensor:
    """Split token ids into patches: ``[..., L * K] -> [..., L, K]``; ValueError where they are not whole patches."""
    if input_ids.shape[-1] % patch_size:
        raise ValueError(f"input_ids must hold whole patches of {patch_size} tokens, got {input_ids.shape[-1]} tokens.")
    return input_ids.unflatten(-1, (-1, patch_size))


def target_patches(labels: Tensor, patch_size: int) -> Tensor:
    """Which patches behind the first have a loss, those without a label -100: ``[B, L * K] -> [B, L - 1]``."""
    return labels[:, patch_size:].ne(-100).unflatten(-1, (-1, patch_size)).all(-1)


def patch_mask(attention_mask: Tensor, patch_size: int, num_patches: int) -> Tensor:
    """A mask of tokens ``[B, L * K]`` or of patches ``[B, L]`` as one of patches; ValueError for another length."""
    length = attention_mask.shape[1]
    if length == num_patches * patch_size:
        return attention_mask.unflatten(1, (-1, patch_size)).amax(-1)
    if length != num_patches:
        raise ValueError(
            f"attention_mask must have an entry for each of the {num_patches * patch_size} tokens or of the "
            f"{num_patches} patches, got {length}."
        )
    return attention_mask


class PatchEmbedding(nn.Module):
    """K token embeddings to one input of the backbone: ``[..., K, D] -> [..., D]``."""

    def __init__(self, patch_size: int, hidden_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(patch_size * hidden_size, 2 * hidden_size),
            nn.SiLU(),
            nn.Linear(2 * hidden_size, hidden_size),
            nn.LayerNorm(hidden_size, eps=1e-6),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings.flatten(-2))
