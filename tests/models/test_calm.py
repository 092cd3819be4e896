import json

import pytest
import tiny
import torch
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from calm import CalmConfig, CalmForCausalLM
from calm.checkpoints.loading import load_model


def test_saved_model_is_self_contained(tmp_path):
    model = tiny.calm()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "moved")
    for loader in (CalmForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path / "moved")
        for name, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
        assert not any(parameter.requires_grad for parameter in loaded.autoencoder.parameters())
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert config["patch_size"] == 4
    assert config["head_config"]["type"] == "energy"


@pytest.mark.parametrize(("former", "make"), [("calm", tiny.calm), ("calm_autoencoder", tiny.autoencoder)])
def test_checkpoints_saved_under_the_former_model_type_load(former, make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == former.replace("calm", "calm-lm").replace("_", "-")
    fields |= {"model_type": former}
    if former == "calm":
        fields["autoencoder_config"]["model_type"] = "calm_autoencoder"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    auto_class = AutoModelForCausalLM if former == "calm" else AutoModel
    for load in (type(model).from_pretrained, auto_class.from_pretrained, load_model):
        loaded = load(tmp_path)
        assert type(loaded) is type(model)
        assert loaded.config.to_dict()["model_type"] == type(model.config).model_type
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    # transformers warns where the names differ.
    assert type(model.config).get_config_dict(tmp_path)[0]["model_type"] == type(model.config).model_type


def test_the_type_a_configuration_was_saved_with_does_not_matter_to_a_new_model(tmp_path):
    tiny.calm().to(torch.bfloat16).save_pretrained(tmp_path)
    model = CalmForCausalLM(CalmConfig.from_pretrained(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    half = CalmForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_what_is_no_calm_is_named(tmp_path):
    tiny.autoencoder().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="holds a model of type 'calm-lm-autoencoder'; CalmForCausalLM loads type 'calm-lm'"
    ):
        CalmForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocab_size is a field of backbone_config and autoencoder_config"):
        CalmConfig(vocab_size=48)


def test_a_mask_may_count_tokens_or_patches():
    model, ids = tiny.calm(), tiny.tokens(2, 16)
    patches = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    by_patch = model(ids, attention_mask=patches).last_hidden_state
    tokens = patches.repeat_interleave(4, dim=1)
    tokens[1, 8:10] = 0  # a patch counts where any of its tokens does
    assert torch.equal(model(ids, attention_mask=tokens).last_hidden_state, by_patch)
    assert not torch.allclose(model(ids).last_hidden_state[1, 2:], by_patch[1, 2:])
    with pytest.raises(ValueError, match="each of the 16 tokens or of the 4 patches, got 15"):
        model(ids, attention_mask=tokens[:, 1:])


def test_nothing_thaws_the_autoencoder():
    model = tiny.calm().train()
    assert model.head.training
    assert not model.autoencoder.training
    model.requires_grad_(False)
    assert not any(each.requires_grad for each in model.parameters())
    model.requires_grad_(True)
    assert all(each.requires_grad for each in model.backbone.parameters())
    assert not any(each.requires_grad for each in model.autoencoder.parameters())


def test_forward_is_called_as_models_of_transformers_are():
    model, ids = tiny.calm(token_prediction="independent"), tiny.tokens(2, 16)
    output = model(input_ids=ids, labels=ids.int(), output_hidden_states=True, inputs_embeds=None)
    assert output[0] is output.loss
    assert len(output.hidden_states) == 3  # the input of two layers, and what they give
    assert isinstance(model(input_ids=ids, return_dict=False), tuple)
    assert model(input_ids=ids[:, :4], labels=ids[:, :4]).loss == 0  # nothing to predict
    with pytest.raises(ValueError, match="the forward of a CALM has no argument inputs_embeds"):
        model(input_ids=ids, inputs_embeds=torch.zeros(1))


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ((2, 16), (2, 12), r"labels must have the shape of input_ids, \(2, 16\), got \(2, 12\)"),
        ((16,), (16,), r"input_ids must be \[batch, tokens\] with at least a patch, got \(16,\)"),
        ((2, 0), (2, 0), r"with at least a patch, got \(2, 0\)"),
        ((2, 15), (2, 15), r"whole patches of 4 tokens, got 15 tokens: for training, calm\.data\.collator"),
    ],
)
def test_batches_of_another_shape_are_named(ids, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny.calm()(input_ids=torch.full(ids, 3), labels=torch.full(labels, 3))


@pytest.mark.parametrize(
    ("kind", "message"), [("mamba", "state in place of a key/value cache"), ("gemma3", "gemma3_text")]
)
def test_backbones_without_a_cache_or_of_more_than_text_are_refused(kind, message):
    config = {"model_type": kind, "vocab_size": tiny.VOCAB_SIZE}
    if kind == "mamba":
        config |= {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(ValueError, match=message):
        CalmForCausalLM(CalmConfig(autoencoder_config=tiny.autoencoder_config(), backbone_config=config))


def test_last_layer_of_the_head_starts_at_zero():
    model = CalmForCausalLM(tiny.calm().config)
    assert model.head.sample(torch.randn(3, 16)).abs().max() == 0


def test_a_patch_with_a_masked_label_is_no_target():
    model, ids = tiny.calm(), tiny.tokens(2, 16)
    noise, target_noise = model.head.draw_noise(torch.zeros(2, 3, 16), 4), torch.randn(8, 2, 3, 8)
    labels = ids.clone()
    labels[0, 5] = -100  # one token of the second patch
    masked = model(ids, labels=labels, noise=noise, target_noise=target_noise).loss
    whole_patch = ids.clone()
    whole_patch[0, 4:8] = -100
    expected = model(ids, labels=whole_patch, noise=noise, target_noise=target_noise).loss
    torch.testing.assert_close(masked, expected)
    assert not torch.isclose(masked, model(ids, labels=ids, noise=noise, target_noise=target_noise).loss)


def test_no_target_gives_zero_loss_and_no_nan():
    model, ids = tiny.calm(), tiny.tokens(2, 16)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0


def test_condition_residual_opens_a_path_for_the_context():
    model = tiny.calm(condition_residual=True)
    for block in model.head.blocks:  # with the blocks shut, only the residual path is left
        torch.nn.init.zeros_(block.down_proj.weight)
        torch.nn.init.zeros_(block.down_proj.bias)
    noise = torch.rand(1, 6) - 0.5
    first, second = model.head.sample(torch.randn(2, 16), noise.expand(2, -1))
    assert not torch.allclose(first, second)


class _Noise(torch.utils.data.Dataset):
    """Blocks of fixed tokens."""

    ids = tiny.tokens(8, 16)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def test_one_step_of_8_equals_8_accumulated_steps_of_1(tmp_path):
    def trained(batch, accumulation):
        model = tiny.calm()
        # The same noise for every position, so that the two runs differ in nothing but the batching.
        draw = torch.rand((4, 1, 1, 6), generator=torch.Generator().manual_seed(1)) - 0.5
        model.head.draw_noise = lambda hidden, *_, **__: draw.expand(-1, *hidden.shape[:-1], -1)
        model.autoencoder.encoder.to_posterior.weight.data[8:] = 0
        model.autoencoder.encoder.to_posterior.bias.data[8:] = -30  # no spread: the targets are the means
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            max_steps=2, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=_Noise()).train()
        return {name: value for name, value in model.state_dict().items() if not name.startswith("autoencoder")}

    whole, accumulated = trained(8, 1), trained(1, 8)
    start = tiny.calm().state_dict()
    moved = 0
    for name, value in whole.items():
        torch.testing.assert_close(value, accumulated[name], rtol=1e-4, atol=1e-6)
        moved += not torch.allclose(value, start[name])
    assert moved > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_config": {"type": "gan"}}, "head_config.type must be one of energy.*got 'gan'"),
        ({"head_config": {"num_samples": 1}}, "num_samples must be at least 2.*got 1"),
        ({"head_config": {"alpha": 2.0}}, r"alpha must lie in \(0, 2\), got 2.0"),
        ({"patch_size": 3}, "patch_size is 3, but the autoencoder was built for 4"),
        ({"backbone_config": {"model_type": "bert"}}, "a bert is an encoder, which would see what it has to predict"),
        ({"backbone_config": {"model_type": "t5"}}, "of a decoder-only model such as llama, got model_type 't5'"),
        ({"backbone_config": tiny.backbone(vocab_size=50)}, r"vocab_size \(50\) and .*\(48\) must be equal"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    fields = {"autoencoder_config": tiny.autoencoder_config(), "backbone_config": tiny.backbone()}
    with pytest.raises(ValueError, match=message):
        CalmConfig(**fields | changes)


def test_a_whole_number_is_a_number():
    autoencoder = tiny.autoencoder_config(latent_dropout=0, token_dropout=0, kl_weight=1, kl_clip=0)
    head = {"type": "energy", "alpha": 1}
    CalmConfig(autoencoder_config=autoencoder, backbone_config=tiny.backbone(), head_config=head, mtp_weight=3)
    CalmConfig(
        autoencoder_config=autoencoder,
        backbone_config=tiny.backbone(),
        head_config={"type": "diffusion", "clip_latent": 4},
    )


def test_configurations_with_removed_options_load_and_name_those_that_had_an_effect(tmp_path):
    tiny.calm().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["head_config"] |= {"num_latent_groups": 1, "mean_pull_weight": 0.0}  # as every model was saved
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = CalmForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.config.head_config, "num_latent_groups")
    config["head_config"]["num_latent_groups"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(FutureWarning, match=r"head_config: num_latent_groups was removed and is ignored \(it was 4\)"):
        loaded = CalmForCausalLM.from_pretrained(tmp_path)
    ids = tiny.tokens(1, 8)
    assert torch.equal(loaded(ids).last_hidden_state, tiny.calm()(ids).last_hidden_state)


def test_the_kind_of_attention_can_be_chosen(tmp_path):
    tiny.calm().save_pretrained(tmp_path)
    ids = torch.randint(2, tiny.VOCAB_SIZE, (1, 16))
    hidden = []
    for kind in ("sdpa", "eager"):
        model = CalmForCausalLM.from_pretrained(tmp_path, attn_implementation=kind)
        assert model.backbone.config._attn_implementation == kind
        hidden.append(model(ids).last_hidden_state)
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation("sdpa")
    assert model.backbone.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("token_id", [-5, 10**6])
def test_the_token_that_begins_a_text_is_in_the_vocabulary(token_id):
    fields = tiny.calm().config.to_dict() | {"eos_token_id": token_id, "document_separator_id": None}
    with pytest.raises(ValueError, match=rf"the document separator .* is {token_id}, and the vocabulary has the ids 0"):
        CalmConfig.from_dict(fields)


def test_the_vocabulary_is_the_autoencoders():
    model = tiny.calm()
    with pytest.raises(ValueError, match="the vocabulary of a CALM is that of its frozen autoencoder"):
        model.resize_token_embeddings(tiny.VOCAB_SIZE + 2)
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == tiny.VOCAB_SIZE


def test_parts_that_read_weights_past_their_modules_stay_on_one_device():
    assert {"CalmAutoencoder", "EnergyHead", "LlamaDecoderLayer"} <= set(tiny.calm()._no_split_modules)
