"""Checkpoints in the layout of the reference implementation: a recorded one, and our own written that way."""

import json
import pickle
import re
import shutil

import golden
import pytest
import tiny
import torch
from safetensors.torch import save_file

from calm import CalmAutoencoder, CalmForCausalLM
from calm.checkpoints.loading import load_autoencoder, load_language_model, load_model
from calm.checkpoints.reference import save_reference

CHECKPOINT = golden.DATA / "checkpoint_k4"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy to spoil."""
    return shutil.copytree(CHECKPOINT / "energy", tmp_path / "energy")


def weights(checkpoint):
    return torch.load(checkpoint / "pytorch_model.bin", weights_only=True)


def test_a_released_language_model_loads_by_itself_and_gives_the_recorded_tensors():
    model, io = CalmForCausalLM.from_pretrained(CHECKPOINT / "energy").eval(), golden.load("checkpoint_k4/io")
    hidden = model(io["input_ids"]).last_hidden_state
    golden.close(hidden, io["hidden_states"])
    pool = model.head.sample(hidden[:, -1:].expand(-1, 200, -1), io["pool_noise"])
    assert torch.equal(model.autoencoder.decode_tokens(pool), io["pool_tokens"].long())


def test_greedy_text_for_zero_noise_is_the_references():
    model, io = CalmForCausalLM.from_pretrained(CHECKPOINT / "energy").eval(), golden.load("checkpoint_k4/io")
    expected = io["generate_T1_zero_noise"]
    sample = model.head.sample
    model.head.sample = lambda hidden, **_: sample(hidden, torch.zeros(len(hidden), 8))
    model.generation_config.eos_token_id = None
    ids = io["input_ids"]
    out = model.generate(ids, max_new_tokens=expected.shape[1] - ids.shape[1], temperature=1.0)
    assert torch.equal(out, expected)


def test_prompts_of_released_models_begin_as_their_training_documents_do():
    model = CalmForCausalLM.from_pretrained(CHECKPOINT / "energy")
    aligned, _ = model.align_prompt(torch.tensor([[5, 6]]))
    assert aligned.tolist() == [[model.config.bos_token_id] * 2 + [5, 6]]


def test_a_released_autoencoder_loads_alone_and_from_the_language_model():
    alone = CalmAutoencoder.from_pretrained(CHECKPOINT / "autoencoder")
    inner = load_autoencoder(CHECKPOINT / "energy")
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, inner.state_dict()[name])


def test_the_autoencoder_can_be_passed_where_the_weights_have_none(checkpoint):
    state = {name: tensor for name, tensor in weights(checkpoint).items() if not name.startswith("ae_model.")}
    torch.save(state, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"hold no autoencoder.*pass it as autoencoder="):
        CalmForCausalLM.from_pretrained(checkpoint)
    autoencoder = CalmAutoencoder.from_pretrained(CHECKPOINT / "autoencoder")
    model = CalmForCausalLM.from_pretrained(checkpoint, autoencoder=autoencoder)
    whole = CalmForCausalLM.from_pretrained(CHECKPOINT / "energy")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


AS_THE_REFERENCE = {
    "energy": {"num_target_samples": 100},
    "diffusion": {"clip_latent": None, "num_sampling_steps": 100},
    "flow": {"num_sampling_steps": 10},
}


@pytest.mark.parametrize("head_type", ["energy", "diffusion", "flow"])
@pytest.mark.parametrize("patch_size", [1, 4])
def test_ours_to_reference_layout_and_back_is_identical(tmp_path, head_type, patch_size):
    model = tiny.calm(patch_size, type=head_type, **AS_THE_REFERENCE[head_type])
    save_reference(model, tmp_path)
    assert "model_type" not in json.loads((tmp_path / "config.json").read_text())
    again = load_language_model(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.config.head_config.to_dict() == model.config.head_config.to_dict()
    assert again.config.autoencoder_config.to_dict() == model.config.autoencoder_config.to_dict() | {
        "architectures": again.config.autoencoder_config.architectures,
        "dtype": again.config.autoencoder_config.to_dict().get("dtype"),
    }
    for name, tensor in model.autoencoder.state_dict().items():
        assert torch.equal(tensor, load_model(tmp_path / "autoencoder").state_dict()[name])


def test_reference_layout_to_ours_and_back_has_the_same_names_and_tensors(tmp_path, checkpoint):
    model = CalmForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "ours")
    save_reference(CalmForCausalLM.from_pretrained(tmp_path / "ours"), tmp_path / "back")
    before, after = weights(checkpoint), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    fields = json.loads((CHECKPOINT / "energy" / "config.json").read_text())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    for name in fields.keys() - {"ae_path", "transformers_version"}:
        assert written[name] == fields[name], name


def test_more_layers_keep_their_order_through_both_layouts(tmp_path):
    model = tiny.autoencoder(num_encoder_layers=4, num_decoder_layers=6)
    save_reference(model, tmp_path)
    ids = tiny.tokens(1, 8)
    again = CalmAutoencoder.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again.encode(ids).mean, model.encode(ids).mean)
    latents = torch.randn(3, 8)
    torch.testing.assert_close(again.decode(latents), model.decode(latents))


def test_sharded_safetensors_load_also_without_the_tied_head(checkpoint):
    state = weights(checkpoint)
    del state["ae_model.decoder.lm_head_weight"]  # safetensors drops the second name of a tensor
    state = {name: tensor for name, tensor in state.items() if not name.startswith("generative_head.")}
    (checkpoint / "pytorch_model.bin").unlink()
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name].clone() for name in part}, checkpoint / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = CalmForCausalLM.from_pretrained(checkpoint)
    whole = CalmForCausalLM.from_pretrained(CHECKPOINT / "energy")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002.safetensors, named in model.safetensors.index"):
        load_model(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_as_asked(dtype):
    model = CalmForCausalLM.from_pretrained(CHECKPOINT / "energy", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_wrong_weights_are_listed_by_name(checkpoint):
    state = weights(checkpoint)
    del state["transformer.norm.weight"]
    state["embed_proj.2.bias"] = torch.zeros(5)
    state["transformer.extra"] = torch.zeros(1)
    torch.save(state, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"do not fit its configuration") as error:
        load_model(checkpoint)
    assert "1 missing: transformer.norm.weight" in str(error.value)
    assert r"1 of another shape: embed_proj.2.bias [5] instead of [48]" in str(error.value)
    assert "1 unknown: " in str(error.value)
    assert "extra" in str(error.value)


def test_a_long_list_of_wrong_weights_is_cut_at_ten(checkpoint):
    state = {name: tensor for name, tensor in weights(checkpoint).items() if not name.startswith("transformer.layers")}
    torch.save(state, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"27 missing: (\S+, ){9}\S+ and 17 more\)"):
        load_model(checkpoint)


def test_wrong_weights_of_our_own_layout_are_listed_by_name(tmp_path):
    model = tiny.calm()
    state = model.state_dict()
    state["head.output_layer.bias"] = torch.zeros(3)
    state["nonsense"] = torch.zeros(1)
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"head.output_layer.bias \[3\] instead of \[8\].*1 unknown: nonsense"):
        load_model(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("patch_size", 2), ("latent_size", 8), ("vocab_size", 96)])
def test_an_autoencoder_that_does_not_belong_is_refused(checkpoint, field, value):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=rf"trained with {field} {value}, but its autoencoder has"):
        load_model(checkpoint)


def test_twins_that_differ_are_refused(checkpoint):
    state = weights(checkpoint)
    state["ae_model.decoder.lm_head_weight"] = state["ae_model.decoder.lm_head_weight"] + 1
    torch.save(state, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lm_head_weight and .*embed_tokens.weight.*must be equal"):
        load_model(checkpoint)


class _Code:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_with_code_is_refused_and_not_run(checkpoint, capsys):
    with open(checkpoint / "pytorch_model.bin", "wb") as file:
        pickle.dump({"transformer.norm.weight": _Code()}, file, protocol=2)
    with pytest.raises(ValueError, match=r"holds more than tensors \(code that loading would run\)"):
        load_model(checkpoint)
    torch.save({"transformer.norm.weight": _Code()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds more than tensors \(code that loading would run\)"):
        load_model(checkpoint)
    assert "code ran" not in capsys.readouterr().out


def test_a_truncated_checkpoint_is_named(checkpoint):
    file = checkpoint / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged or cut short"):
        load_model(checkpoint)


def test_missing_weights_and_configuration_are_named(checkpoint):
    (checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"no weights in .* expected one of model.safetensors"):
        load_model(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no model in .* config.json is missing"):
        load_model(checkpoint)


def test_the_wrong_class_is_named():
    with pytest.raises(ValueError, match=r"holds an autoencoder \(Autoencoder\); CalmForCausalLM cannot load it"):
        CalmForCausalLM.from_pretrained(CHECKPOINT / "autoencoder")
    with pytest.raises(ValueError, match=r"holds a language model \(EnergyTransformer\)"):
        CalmAutoencoder.from_pretrained(CHECKPOINT / "energy")


def test_a_hub_id_without_network_says_what_to_download(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"Without network, download config.json, the weights .*someone/CALM-M"):
        load_model("someone/CALM-M")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"condition_residual": True}, "head_config.condition_residual False there, True here"),
        ({"hidden_size": 24}, "head_config.hidden_size 16 there, 24 here"),
        ({"layer_norm_eps": 1e-5}, "head_config.layer_norm_eps 1e-06 there, 1e-05 here"),
        ({"type": "diffusion", "clip_latent": 2.0}, "head_config.clip_latent None there, 2.0 here"),
        ({"type": "diffusion", "sampler": "ddim"}, "head_config.sampler 'ancestral' there, 'ddim' here"),
    ],
)
def test_what_the_reference_does_not_know_is_refused(tmp_path, head, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        save_reference(tiny.calm(**head), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_head_size_of_its_own_is_refused(tmp_path):
    autoencoder = tiny.autoencoder()
    backbone = tiny.calm().config.backbone_config.to_dict() | {"head_dim": 6}
    with pytest.raises(ValueError, match=r"backbone_config.head_dim 8 there, 6 here"):
        save_reference(CalmForCausalLM.from_autoencoder(autoencoder, backbone), tmp_path / "model")


def test_what_the_reference_samples_otherwise_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"num_sampling_steps 10 there, 3 here"):
        save_reference(tiny.calm(type="flow", num_sampling_steps=3), tmp_path / "model")
