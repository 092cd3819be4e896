"""Configurations of the heads; ``type`` tells them apart."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from calm.utils.deprecation import REMOVED_ENERGY_FIELDS, drop_removed


class HeadConfig(PreTrainedConfig):
    """What the configurations of all heads share."""

    base_config_key = "head_config"
    num_samples = 1  # passes through the head per position in the loss

    @property
    def num_network_calls(self) -> int:
        """Passes through the head's network for one draw."""
        return 1

    def _check_at_least(self, smallest: int, *names: str, because: str = "") -> None:
        for name in names:
            if getattr(self, name) is not None and getattr(self, name) < smallest:
                raise ValueError(f"head_config.{name} must be at least {smallest}{because}, got {getattr(self, name)}.")


@strict
class EnergyHeadConfig(HeadConfig):
    r"""
    The head that maps uniform noise and a hidden state to a latent vector, trained by the energy score.

    Args:
        type: ``"energy"``.
        num_mlp_layers: residual blocks. The paper takes a quarter of the backbone's layers.
        hidden_size: width of the blocks; default, and in the paper, the backbone's.
        noise_size: entries of the uniform noise.
        num_samples: N, draws of the head per position in the loss.
        num_target_samples: M, draws of the true patch's posterior per position in the loss.
        alpha: exponent of the energy score, in (0, 2).
        condition_residual: whether the hidden state also enters the residual stream, beside the noise. In the paper it
            acts through the gates of the blocks alone, which start out almost closed: small models on small budgets
            then hardly learn to look at their context.
    """

    model_type = "calm_energy_head"

    type: Literal["energy"] = "energy"
    num_mlp_layers: int = 4
    hidden_size: int | None = None
    noise_size: int = 64
    num_samples: int = 8
    num_target_samples: int = 100
    alpha: float | int = 1.0
    condition_residual: bool = False
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        drop_removed(kwargs, REMOVED_ENERGY_FIELDS, "head_config")
        super().__post_init__(**kwargs)
        self._check_at_least(2, "num_samples", because=" (the score compares pairs)")
        self._check_at_least(1, "num_target_samples", "noise_size", "num_mlp_layers", "hidden_size")
        if not 0 < self.alpha < 2:
            raise ValueError(f"head_config.alpha must lie in (0, 2), got {self.alpha}.")


@strict
class DiffusionHeadConfig(HeadConfig):
    r"""
    The head that removes noise from a latent vector step by step.

    Args:
        type: ``"diffusion"``.
        num_mlp_layers: residual blocks.
        hidden_size: width of the blocks; default the backbone's.
        num_samples: N, noisy vectors per position in the loss.
        num_train_timesteps: steps of the process it is trained on (cosine schedule).
        num_sampling_steps: steps of a draw, evenly spread over those.
        sampler: ``"ancestral"`` draws every step with the learned variance; ``"ddim"`` is deterministic behind the
            first noise and needs fewer steps.
        clip_latent: bound of the latent's entries as estimated on the way; none in the paper. Small models need one
            (4, say): in the first steps, almost pure noise, their errors are amplified ten thousand times.
    """

    model_type = "calm_diffusion_head"

    type: Literal["diffusion"] = "diffusion"
    num_mlp_layers: int = 4
    hidden_size: int | None = None
    num_samples: int = 8
    num_train_timesteps: int = 1000
    num_sampling_steps: int = 100
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    clip_latent: float | int | None = None
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_at_least(
            1, "num_samples", "num_mlp_layers", "num_train_timesteps", "num_sampling_steps", "hidden_size"
        )
        if self.num_sampling_steps > self.num_train_timesteps:
            raise ValueError(
                f"head_config.num_sampling_steps ({self.num_sampling_steps}) must not exceed num_train_timesteps "
                f"({self.num_train_timesteps})."
            )
        if self.clip_latent is not None and not self.clip_latent > 0:
            raise ValueError(f"head_config.clip_latent must be above 0 or null, got {self.clip_latent}.")

    @property
    def num_network_calls(self) -> int:
        return self.num_sampling_steps


@strict
class FlowHeadConfig(HeadConfig):
    r"""
    The head that follows a learned velocity from noise to a latent vector.

    Args:
        type: ``"flow"``.
        num_mlp_layers: residual blocks.
        hidden_size: width of the blocks; default the backbone's.
        num_samples: N, points on paths per position in the loss.
        num_sampling_steps: steps of the solver in a draw.
        solver: ``"midpoint"`` (two passes through the network per step) or ``"euler"`` (one).
    """

    model_type = "calm_flow_head"

    type: Literal["flow"] = "flow"
    num_mlp_layers: int = 4
    hidden_size: int | None = None
    num_samples: int = 8
    num_sampling_steps: int = 10
    solver: Literal["midpoint", "euler"] = "midpoint"
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_at_least(1, "num_samples", "num_mlp_layers", "num_sampling_steps", "hidden_size")

    @property
    def num_network_calls(self) -> int:
        return self.num_sampling_steps * (2 if self.solver == "midpoint" else 1)


@strict
class CategoricalFlowHeadConfig(HeadConfig):
    r"""
    The head that chooses the tokens of a patch in a few passes, trained by cross-entropy. It needs the autoencoder of
    token codes ([`TokenCodesConfig`]).

    Args:
        type: ``"categorical_flow"``.
        num_mlp_layers: residual blocks of the network of the later passes.
        hidden_size: width of the blocks; default the backbone's.
        code_size: dimensions of a token's code; default, and required to be, the autoencoder's.
        num_passes: passes of a sample, at least 2, by default log2(K) + 1. The first pass is multi-token prediction.
            Every pass chooses the next tokens of the patch, and later passes see them.
        shortlist_size: M, the most likely tokens of the first pass that later passes choose from; default all tokens.
    """

    model_type = "calm_categorical_flow_head"

    type: Literal["categorical_flow"] = "categorical_flow"
    num_mlp_layers: int = 3
    hidden_size: int | None = None
    code_size: int | None = None
    num_passes: int | None = None
    shortlist_size: int | None = None
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_at_least(1, "num_mlp_layers", "hidden_size", "code_size", "shortlist_size")
        self._check_at_least(2, "num_passes", because=" (the first pass predicts the tokens independently)")

    def schedule(self, patch_size: int) -> list[int]:
        """Return how many tokens of a patch of K are chosen before each pass.

        The number grows by equal factors: 0, 1, 2, 4 for K = 8 in four passes.
        """
        num_passes = min(self.num_passes or math.ceil(math.log2(patch_size)) + 1, patch_size)
        counts = [0]
        for index in range(1, num_passes):
            # The small summand keeps 8 ** (1 / 3) from falling below 2.
            counts.append(max(counts[-1] + 1, int(patch_size ** (index / num_passes) + 1e-9)))
        return counts


HEAD_CONFIGS: dict[str, type[HeadConfig]] = {
    "energy": EnergyHeadConfig,
    "diffusion": DiffusionHeadConfig,
    "flow": FlowHeadConfig,
    "categorical_flow": CategoricalFlowHeadConfig,
}
