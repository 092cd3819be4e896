"""The language model: a causal transformer over patches that predicts the latent of the next patch.

Shapes: B batch, T = L * K tokens, L patches, K tokens of a patch, D hidden, Z latent.
"""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from calm.checkpoints.reference import load_pretrained
from calm.compat.candidate_generator import accept_own_candidate_generators
from calm.compat.weight_names import save_under_present_names
from calm.functional.rng import Generator
from calm.generation.loop import CalmGenerationMixin
from calm.generation.samplers import default_sampler
from calm.generation.settings import GENERATION_DEFAULTS
from calm.models.configuration_calm import CalmConfig
from calm.models.configuration_codes import TokenCodesConfig
from calm.models.decoded_brier import decoded_brier
from calm.models.frozen import check_frozen, keep_adapters_out
from calm.models.heads.registry import find_head
from calm.models.layer_access import device_of, embedding_matrix
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_codes import TokenCodes
from calm.models.mtp import MTPHead
from calm.models.outputs import CalmOutput, NoLogitsError
from calm.models.patches import PatchEmbedding, patch_mask, target_patches
from calm.utils.deprecation import RENAMED_CALM_PARTS

accept_own_candidate_generators()
_RANDOM_AUTOENCODER = (
    "the autoencoder of this CALM has random weights, and it stays frozen: use CalmForCausalLM.from_autoencoder(...) "
    "with a trained one, or from_pretrained(...)."
)


def new_autoencoder(config: Any) -> CalmAutoencoder | TokenCodes:
    """Return a new autoencoder of the kind that its configuration describes."""
    return TokenCodes(config) if isinstance(config, TokenCodesConfig) else CalmAutoencoder(config)


def _rename_former_parts(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the weights of a state dict that an earlier release wrote their present names, in place."""
    for former, present in RENAMED_CALM_PARTS.items():
        start = f"{prefix}{former}."
        for name in [name for name in state_dict if name.startswith(start)]:
            state_dict[f"{prefix}{present}.{name.removeprefix(start)}"] = state_dict.pop(name)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class CalmForCausalLM(PreTrainedModel, CalmGenerationMixin):
    """Continuous autoregressive language model; see :class:`CalmConfig`.

    A saved model contains its autoencoder, so one directory is a complete model.
    """

    config: CalmConfig
    config_class = CalmConfig
    base_model_prefix = "calm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Parts that read weights past their modules, and must be on one device; the head names itself.
    _no_split_modules = ["CalmAutoencoder", "MTPHead"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # The loss is a mean over patches of the micro-batch: Trainer must divide it by the accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: CalmConfig):
        super().__init__(config)
        # Not with the type saved in its configuration: the other parts would have another one.
        self.backbone = AutoModel.from_config(
            config.backbone_config, dtype=torch.get_default_dtype(), trust_remote_code=False
        )
        if getattr(self.backbone, "_is_stateful", False):
            raise ValueError(
                f"backbone_config: a {config.backbone_config.model_type} has layers with a state in place of a "
                "key/value cache, which generation and scores need; use one with attention layers only."
            )
        self.patch_embedding = PatchEmbedding(config.patch_size, config.hidden_size)
        self.head = find_head(config.head_config.type)(
            config.head_config, config.hidden_size, config.autoencoder_config.latent_size
        )
        self.autoencoder = new_autoencoder(config.autoencoder_config)
        self.head.attach(self.backbone.get_input_embeddings(), self.autoencoder)
        if config.mtp_weight:
            self.mtp_head = self._new_mtp_head()
        self.post_init()
        self.generation_config = GenerationConfig(
            **GENERATION_DEFAULTS | {"sampler": default_sampler(self)},
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
        )
        self._register_load_state_dict_pre_hook(_rename_former_parts)
        keep_adapters_out(self.autoencoder)
        self.train(self.training)  # freezes the autoencoder
        weight = next(self.autoencoder.parameters(), None)
        if weight is not None and weight.device.type != "meta":  # weights are loaded into models on the meta device
            warnings.warn(_RANDOM_AUTOENCODER, stacklevel=2)

    @property
    def token_predictor(self) -> MTPHead:
        """Return ``mtp_head`` under its former name."""
        return self.mtp_head

    def _new_mtp_head(self) -> MTPHead:
        config = self.config
        return MTPHead(config.patch_size, config.hidden_size, config.mtp_type == "autoregressive")

    def add_mtp_head(self, weight: float, type: Literal["independent", "autoregressive"] = "autoregressive") -> None:
        """Add a freshly initialised MTP head to a trained model.

        Args:
            weight, type: ``mtp_weight`` and ``mtp_type`` of :class:`CalmConfig`.

        Raises:
            ValueError: when the model has an MTP head.
        """
        if self.config.mtp_weight:
            raise ValueError(
                f"the model has an MTP head already (mtp_type {self.config.mtp_type}): leave mtp_weight and mtp_type "
                "out."
            )
        self.config.mtp_weight, self.config.mtp_type = weight, type
        self.config.check_loss_weights()
        if weight:
            self.mtp_head = self._new_mtp_head().to(self.device, self.dtype)
            with torch.no_grad():
                self.mtp_head.apply(self._init_weights)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise all weights, then those that the head initialises itself; loaded tensors are not changed."""
        super().initialize_weights()
        self.head.init_weights()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, autoencoder: CalmAutoencoder | None = None, **kwargs: Any
    ) -> "CalmForCausalLM":
        """Load a directory or hub id, in our layout or in the reference implementation's.

        Args:
            autoencoder: autoencoder for a checkpoint of the reference that has none.
            kwargs: arguments of transformers: ``dtype``, ``device_map``, ``revision``, ...
        """
        former_names = {rf"^{old}\.": f"{new}." for old, new in RENAMED_CALM_PARTS.items()}
        kwargs["key_mapping"] = former_names | (kwargs.get("key_mapping") or {})
        loaded: Any = load_pretrained(
            cls, super().from_pretrained, pretrained_model_name_or_path, *args, autoencoder=autoencoder, **kwargs
        )
        save_under_present_names(loaded[0] if isinstance(loaded, tuple) else loaded, former_names)
        return loaded

    @classmethod
    def from_autoencoder(
        cls, autoencoder: CalmAutoencoder | TokenCodes, backbone_config: Any, head_config: Any = None, **fields: Any
    ) -> "CalmForCausalLM":
        """Return a new model with a copy of a trained autoencoder; all other weights are freshly initialised.

        Args:
            fields: other fields of :class:`CalmConfig`.
        """
        config = CalmConfig(
            backbone_config=backbone_config, head_config=head_config, autoencoder_config=autoencoder.config, **fields
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_RANDOM_AUTOENCODER[:40])
            model = cls(config)
        model.autoencoder.load_state_dict(autoencoder.state_dict())
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Return the device of the inputs; if the model is spread over devices, that of the token embeddings."""
        return device_of(self)

    def token_matrix(self, device: torch.device) -> Tensor:
        """Return the token embeddings of the backbone as the output layer of the MTP head, ``[V, D]``."""
        return embedding_matrix(self.get_input_embeddings(), self.config.vocab_size, device)

    def train(self, mode: bool = True) -> "CalmForCausalLM":
        """Set the mode of all parts but the autoencoder: it encodes the targets, frozen and without dropout."""
        super().train(mode)
        self.autoencoder.requires_grad_(False).eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "CalmForCausalLM":
        """Set ``requires_grad`` of all parts but the autoencoder, which stays frozen."""
        super().requires_grad_(requires_grad)
        self.autoencoder.requires_grad_(False)
        return self

    def embed_patches(self, input_ids: Tensor) -> Tensor:
        """Return the inputs of the backbone: token ids ``[B, T]``, T a multiple of K -> ``[B, L, D]``."""
        patch_size = self.config.patch_size
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be [batch, tokens] with at least a patch, got {tuple(input_ids.shape)}.")
        if input_ids.shape[1] % patch_size:
            raise ValueError(
                f"input_ids must hold whole patches of {patch_size} tokens, got {input_ids.shape[1]} tokens: for "
                "training, calm.data.collator pads texts to them; generate() aligns prompts itself."
            )
        return self.patch_embedding(self.get_input_embeddings()(input_ids.unflatten(-1, (-1, patch_size))))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the inputs as they are; peft requires this method of models of its task type CAUSAL_LM."""
        return {"input_ids": input_ids} | kwargs

    def candidate_generator(
        self, target: PreTrainedModel, generation_config: Any, input_ids: Tensor, model_kwargs: Any, tokenizer: Any
    ) -> Any:
        """Return what ``target.generate(..., assistant_model=calm)`` of transformers calls for candidates."""
        from calm.generation.assisted import CalmCandidates

        return CalmCandidates(self.eval(), target, generation_config, input_ids, tokenizer)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "the vocabulary of a CALM is that of its frozen autoencoder: train an autoencoder with the larger one, and "
            "a CALM with it."
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        generator: Generator = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CalmOutput | tuple:
        """Compute the hidden states of the patches and, with labels, the loss of predicting each from those before it.

        Args:
            input_ids: ``[B, T]``, T a multiple of K.
            attention_mask: ``[B, L (+ cached)]``, one entry per *patch*, 0 for padding; without a cache also
                ``[B, T]``, one per token: a patch counts if any of its tokens does; or ``[B, 1, L, ...]`` in the
                format of the backbone.
            labels: ``[B, T]``, usually ``input_ids``. A patch with any label -100 is no target.
            position_ids: ``[B, L]``, positions of the patches.
            noise, target_noise: noise in the loss of the head, ``[N, B, L - 1, ...]`` and ``[M, B, L - 1, Z]``; given
                both, the loss is deterministic.
            generator: source of the noise otherwise; one, or a list of one per row: the loss of a row then does not
                depend on the rows beside it.
            output_hidden_states: whether to return the states after every layer of the backbone.
            return_dict: False for a tuple.
            others: other arguments of transformers' models (``inputs_embeds``, ...), None or False.
        """
        if asked := [name for name, value in others.items() if value is not None and value is not False]:
            raise ValueError(f"the forward of a CALM has no argument {', '.join(asked)}.")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(labels.shape)}."
            )
        # trl's SFTTrainer multiplies the hidden states with an output embedding, which a CALM does not have.
        if labels is None and use_cache is False and self.training and torch.is_grad_enabled():
            raise NoLogitsError
        inputs_embeds = self.embed_patches(input_ids)
        if attention_mask is not None and attention_mask.dim() == 2 and past_key_values is None:
            attention_mask = patch_mask(attention_mask, self.config.patch_size, inputs_embeds.shape[1])
        outputs = self.backbone(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            use_cache=bool(use_cache),
            output_hidden_states=bool(output_hidden_states),
        )
        hidden = outputs.last_hidden_state
        loss, metrics = None, None
        if labels is not None:
            loss, metrics = self._loss(hidden, labels, noise, target_noise, generator)
        states = outputs.hidden_states if output_hidden_states else None
        output = CalmOutput(loss, hidden, outputs.past_key_values, metrics, states)
        return output.to_tuple() if return_dict is False else output

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        noise: Tensor | None,
        target_noise: Tensor | None,
        generator: Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        patch_size = self.config.patch_size
        check_frozen(self.autoencoder)
        labels = labels.long()
        is_target = target_patches(labels, patch_size)
        ids = labels[:, patch_size:].clamp(min=0)
        with torch.no_grad():
            posterior = self.autoencoder.encode(ids)
        head_loss = self.head.loss(hidden[:, :-1], posterior, noise, target_noise, generator)
        # Positions without a target have weight 0, so that shapes are fixed and no device waits for their number.
        weight = is_target / is_target.sum().clamp(min=1)
        metrics = {name: (value.detach() * weight).sum() for name, value in head_loss.metrics.items()}
        loss = (head_loss.loss * weight).sum()
        if self.config.decoded_brier_weight:
            assert head_loss.samples is not None
            brier = (self._decoded_brier(head_loss.samples, ids) * weight).sum()
            loss = loss - self.config.decoded_brier_weight * brier
            metrics["decoded_brier"] = brier.detach()
        # The loss of a frozen MTP head on a frozen backbone has no gradient.
        if self.config.mtp_weight and any(
            _is_trained(part) for part in (self.backbone, self.patch_embedding, self.mtp_head)
        ):
            token_ids = labels[:, patch_size:].unflatten(-1, (-1, patch_size))
            embeddings = self.token_matrix(hidden.device)
            cross_entropy = self.mtp_head.loss(hidden[:, :-1], token_ids, is_target, embeddings)
            loss = loss + self.config.mtp_weight * cross_entropy
            metrics["token_cross_entropy"] = cross_entropy.detach()
        return loss, metrics

    def _decoded_brier(self, samples: Tensor, ids: Tensor) -> Tensor:
        """Score samples ``[N, B, L - 1, Z]`` against text ``[B, (L - 1) * K]``: ``[B, L - 1]``."""
        # The frozen autoencoder keeps its precision if a sharded model has another.
        states = self.autoencoder.decoder(samples.to(self.autoencoder.dtype))
        text = ids.view(states.shape[1:-1])
        matrix = self.autoencoder.output_matrix(states.device)
        brier = decoded_brier(states.flatten(1, 2), matrix, text.flatten(0, 1))
        return brier.view(samples.shape[1:-1])


AutoModelForCausalLM.register(CalmConfig, CalmForCausalLM, exist_ok=True)
