"""Names of tensors: ours and the reference implementation's, by prefix."""

from calm.models.configuration_autoencoder import CalmAutoencoderConfig
from calm.models.configuration_calm import CalmConfig


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
    names = _energy_names if head.type == "energy" else _adaptive_names
    return inner | names(head.num_mlp_layers) | {"backbone": "transformer", "patch_embedding.layers": "embed_proj"}


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


def _energy_names(num_layers: int) -> dict[str, str]:
    names = {
        "head.noise_proj": "mlp_generator.noise_embd",
        "head.noise_norm": "mlp_generator.norm_noise",
        "head.hidden_proj": "mlp_generator.hidden_embd",
        "head.hidden_norm": "mlp_generator.norm_hidden",
        "head.final_norm": "mlp_generator.final_layer.in_ln",
        "head.final_mlp.0": "mlp_generator.final_layer.linears.0",
        "head.output_layer": "mlp_generator.final_layer.linears.2",
    }
    parts = {"norm": "in_ln", "mix": "linears.0", "mlp.1": "linears.2", "mlp.3": "linears.4", "down_proj": "down_proj"}
    for layer in range(num_layers):
        names |= {f"head.blocks.{layer}.{o}": f"mlp_generator.mlp_blocks.{layer}.{t}" for o, t in parts.items()}
    return names


def _adaptive_names(num_layers: int) -> dict[str, str]:
    names = {
        "head.network.input_proj": "generative_head.net.input_proj",
        "head.network.time_embedding": "generative_head.net.time_embed",
        "head.network.hidden_proj": "generative_head.net.cond_embed",
        "head.network.final_modulation": "generative_head.net.final_layer.adaLN_modulation.1",
        "head.network.output_layer": "generative_head.net.final_layer.linear",
    }
    parts = {"norm": "in_ln", "mlp": "mlp", "modulation": "adaLN_modulation.1"}
    for layer in range(num_layers):
        names |= {
            f"head.network.blocks.{layer}.{o}": f"generative_head.net.res_blocks.{layer}.{t}" for o, t in parts.items()
        }
    return names
