"""Low-rank adapters of the peft library on a language model."""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

# Of peft, about names that transformers gave up.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

LAYERS = {
    "energy": ["q_proj", "v_proj", "hidden_proj", "mix", "down_proj"],
    "flow": ["q_proj", "v_proj"],
    "diffusion": ["q_proj", "v_proj"],
}


@pytest.mark.filterwarnings("ignore:the autoencoder of a CALM is frozen:UserWarning")  # it has layers of these names
@pytest.mark.parametrize("head_type", LAYERS)
def test_adapters_learn_alone_and_can_be_saved_loaded_and_merged(head_type, tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(2, tiny.VOCAB_SIZE, (4, 16))
    plain = {name: value.clone() for name, value in tiny.calm(type=head_type).state_dict().items()}
    model = get_peft_model(tiny.calm(type=head_type), LoraConfig(r=4, target_modules=LAYERS[head_type]))
    before = loss(model, ids)
    assert before == pytest.approx(loss(tiny.calm(type=head_type), ids), rel=1e-5)  # an adapter starts as nothing

    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss.backward()
        optimizer.step()
    after = loss(model, ids)
    assert after < before

    model.save_pretrained(tmp_path / "adapter")
    assert loss(PeftModel.from_pretrained(tiny.calm(type=head_type), tmp_path / "adapter"), ids) == (
        pytest.approx(after, rel=1e-5)
    )
    text = model.generate(input_ids=ids[:1], max_new_tokens=8, generator=torch.Generator().manual_seed(0))
    merged = model.merge_and_unload()
    assert loss(merged, ids) == pytest.approx(after, rel=1e-4)
    again = merged.generate(ids[:1], max_new_tokens=8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, text)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, plain[name])}
    assert changed
    assert all(name.split(".")[-2] in LAYERS[head_type] for name in changed)


def loss(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss.item()


def test_token_prediction_goes_on_teaching_an_adapted_backbone():
    torch.manual_seed(0)
    ids = torch.randint(2, tiny.VOCAB_SIZE, (4, 16))
    model = get_peft_model(tiny.calm(token_prediction="autoregressive"), LoraConfig(r=4, target_modules=["q_proj"]))
    assert "token_cross_entropy" in model(input_ids=ids, labels=ids).metrics
    # Nothing is computed for what nobody learns from.
    model.base_model.model.backbone.requires_grad_(False)
    assert "token_cross_entropy" not in model(input_ids=ids, labels=ids).metrics


def test_the_task_type_of_language_models_works():
    ids = tiny.tokens(2, 16)
    model = get_peft_model(tiny.calm(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert model.generate(input_ids=ids, max_new_tokens=5, eos_token_id=[]).shape == (2, 21)


USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": USUAL},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
)
def test_no_adapter_is_put_on_the_frozen_autoencoder(settings, tmp_path):
    ids = tiny.tokens(2, 16)
    plain, other = tiny.calm(), tiny.calm()
    plain.config.decoded_brier_weight = other.config.decoded_brier_weight = 20.0
    latents = plain.autoencoder.encode(ids).mean
    before = plain.autoencoder.decode(latents)
    with pytest.warns(UserWarning, match="its layers get no adapter"):
        model = get_peft_model(plain, LoraConfig(r=4, **settings))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert trained
    assert not any(".autoencoder." in name for name in trained)
    assert all(each.grad is not None for each in trained.values())
    optimizer.step()
    assert torch.equal(model.base_model.model.autoencoder.decode(latents), before)

    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="its layers get no adapter"):
        again = PeftModel.from_pretrained(other, tmp_path)
    assert loss(again, ids) == pytest.approx(loss(model, ids), rel=1e-5)


def test_a_second_adapter_is_kept_out_too():
    with pytest.warns(UserWarning, match="no adapter"):
        model = get_peft_model(tiny.calm(), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.warns(UserWarning, match="no adapter"):
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    assert not any("lora" in name for name, _ in model.base_model.model.autoencoder.named_parameters())


def test_parameters_to_be_trained_in_the_autoencoder_are_refused_whoever_put_them_there():
    ids = tiny.tokens(2, 16)
    model = tiny.calm().train()
    layer = model.autoencoder.decoder.expand
    layer.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"autoencoder of a CALM is frozen, and 1 parameters .*decoder\.expand\.scale"):
        model(input_ids=ids, labels=ids)


def test_an_autoencoder_by_itself_can_be_adapted():
    model = get_peft_model(tiny.autoencoder(), LoraConfig(r=4, target_modules=["from_latent", "up_proj"]))
    assert any("lora" in name for name, _ in model.named_parameters())
