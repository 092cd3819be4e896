"""Names of tensors: ours and the reference implementation's, by prefix."""

from calm.models.configuration_autoencoder import CalmAutoencoderConfig
from calm.models.configuration_calm import CalmConfig
from calm.models.heads.registry import find_head


def replace_prefix(name: str, prefixes: dict[str, str]) -> str:
    """The name with its longest known prefix replaced; unchanged when none is known."""
    prefix = max((each for each in prefixes if name.startswith(each + ".")), key=len, default=None)
    return name if prefix is None else prefixes[prefix] + name[len(prefix) :]


def reference_names(config: CalmAutoencoderConfig | CalmConfig) -> dict[str, str]:
    """Our prefix of a tensor's name -> the reference's."""
    if isinstance(config, CalmAutoencoderConfig):
        return _autoencoder_names(config)
    inner = {
        f"autoencoder.{ours}": f"ae_model.{its}" for ours, its in _autoencoder_names(config.autoencoder_config).items()
    }
    head = config.head_config
    names = find_head(head.type).reference_names(head.num_mlp_layers)
    return inner | names | {"backbone": "transformer", "patch_embedding.layers": "embed_proj"}


def _autoencoder_names(config: CalmAutoencoderConfig) -> dict[str, str]:
    names = {
        "embed_tokens": "encoder.embed_tokens",
        "encoder.squeeze": "encoder.squeeze_layer",
        "encoder.norm": "encoder.norm",
        "encoder.to_posterior": "encoder.hidden_to_latent",
        "decoder.from_latent": "decoder.latent_to_hidden",
        "decoder.expand": "decoder.expand_layer",
        "decoder.norm": "decoder.norm",
    }
    for part, stages, num_layers in (
        ("encoder", ("token_blocks", "patch_blocks"), config.num_encoder_layers),
        ("decoder", ("patch_blocks", "token_blocks"), config.num_decoder_layers),
    ):
        for layer in range(num_layers):
            stage, index = divmod(layer, num_layers // 2)
            for ours, its in (("norm", "layernorm"), ("mlp", "mlp")):
                names[f"{part}.{stages[stage]}.{index}.{ours}"] = f"{part}.{part}_layers.{layer}.{its}"
    return names
