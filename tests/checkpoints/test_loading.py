"""What a directory may hold instead of a model: each ends in one clear line, before memory is taken for it."""

import json
import pickle
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from calm import CalmConfig
from calm.checkpoints.loading import load_model
from calm.checkpoints.meta_model import outline
from calm.data.collator import PatchCollator
from calm.models.modeling_calm import NoLogitsError


def save(kind, path):
    torch.manual_seed(0)
    if kind == "calm":
        tiny.calm().save_pretrained(path)
    elif kind == "autoencoder":
        tiny.autoencoder().save_pretrained(path)
    else:
        LlamaForCausalLM(LlamaConfig(**tiny.backbone(eos_token_id=1, pad_token_id=0))).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["calm", "autoencoder", "token model"])
def kind_and_path(request, tmp_path_factory):
    return request.param, save(request.param, tmp_path_factory.mktemp("saved") / "model")


ABSURD = {
    "num_hidden_layers": [10**9, -1, 0, 1e9, "many", [2]],
    "hidden_size": [10**12, -16, 0],
    "num_attention_heads": [0, -2, 10**9],
    "num_key_value_heads": [0, 10**9],
    "vocab_size": [10**12, -1, 0, 10**7],
    "intermediate_size": [10**12, 10**6],
    "hidden_act": ["none_such", 3],
    "rope_parameters": [{"rope_type": "none_such", "rope_theta": 1e4}, {"rope_type": 3}],
    "attn_implementation": ["none_such", {"": "own/code"}],
    "dtype": ["float17", 3],
    "model_type": ["none_such", 3, []],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in ABSURD for value in ABSURD[name]])
def test_settings_that_make_no_model_are_refused_before_memory_is_taken(kind_and_path, tmp_path, name, value):
    kind, source = kind_and_path
    if kind == "autoencoder" and name not in ("hidden_size", "vocab_size", "intermediate_size", "hidden_act", "dtype"):
        pytest.skip("an autoencoder has no such field")
    config = json.loads((source / "config.json").read_text())
    fields = config["backbone_config"] if kind == "calm" and name != "dtype" else config
    if name == "model_type" and kind != "calm":
        pytest.skip("then it is no model of this kind")
    fields[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, OSError)) as refused:
            load_model(tmp_path)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone_config": {"num_hidden_layers": 10**9}},
        {"backbone_config": {"model_type": "qwen2", "num_hidden_layers": 10**9}},
        {"head_config": {"num_mlp_layers": 10**9}},
        {"autoencoder_config": {"num_encoder_layers": 10**9}},
        {"autoencoder_config": {"hidden_size": 10**9}},
    ],
)
def test_a_model_without_end_is_refused_at_once(fields):
    with pytest.raises(ValueError, match="must be at most"):
        CalmConfig(**fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"), ("max_new_tokens", 1.5), ("max_new_tokens", "many"), ("eos_token_id", "end"),
        ("eos_token_id", [[1]]), ("eos_token_id", {"a": 1}), ("pad_token_id", [0]), ("stop_strings", 5), ("sampler", 3),
        ("num_candidates", True), ("do_sample", "yes"), ("top_p", []),
    ],
)  # fmt: skip
def test_a_generation_config_of_the_wrong_types_is_refused_by_name(kind_and_path, tmp_path, name, value):
    _, source = kind_and_path
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name} must be"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {"a": 3}, "metadata": {}}, "no weight_map"),
        ({"weight_map": {"a": "model-1.safetensors"}}, "no metadata"),
        ({"weight_map": {"a": "../model-1.safetensors"}, "metadata": {}}, "outside its directory"),
        ([], "not a valid JSON object"),
    ],
)
def test_an_index_that_lacks_something_is_refused(kind_and_path, tmp_path, index, message):
    _, source = kind_and_path
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("the pickle was run",)


def test_a_pickle_with_code_is_refused_in_one_line_and_not_run(kind_and_path, tmp_path, capsys):
    _, source = kind_and_path
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save({"a": Evil(), "b": torch.zeros(100_000)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds more than tensors|cannot load") as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"cannot load|holds more than tensors|damaged|do not belong together"):
        load_model(tmp_path)
    assert "the pickle was run" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(kind_and_path, tmp_path, value):
    _, source = kind_and_path
    state = load_file(source / "model.safetensors")
    name = sorted(state)[0]
    state[name].view(-1)[-1] = value
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"hold NaN or infinity in 1 tensors .{name}"):
        load_model(tmp_path)


def test_a_configuration_of_more_parameters_than_the_weights_hold_is_refused(tmp_path):
    save("token model", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 2**23, "hidden_size": 2**16}))
    with pytest.raises(ValueError, match="they do not belong together"):
        load_model(tmp_path)


def test_text_of_numbers_that_are_none_is_not_written():
    model = tiny.calm()
    torch.nn.init.constant_(model.backbone.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.generate(tiny.tokens(1, 8), max_new_tokens=4)


def test_what_computes_with_logits_is_refused_in_words(tmp_path):
    model, ids = tiny.calm(), tiny.tokens(2, 8)
    output = model(ids)
    assert not hasattr(output, "logits")
    assert "logits" not in output
    for read in (lambda: output.logits, lambda: output["logits"], lambda: model.train()(ids, use_cache=False)):
        with pytest.raises(NoLogitsError, match="a CALM has no logits"):
            read()
    assert model.train()(ids).last_hidden_state.requires_grad
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", label_smoothing_factor=0.1,
    )  # fmt: skip
    texts = [{"input_ids": ids[0].tolist()}] * 4
    trainer = Trainer(model, arguments, train_dataset=texts, data_collator=PatchCollator(4, 1))
    with pytest.raises(ValueError, match="label smoothing"):
        trainer.train()


def test_an_outline_of_a_wrong_configuration_is_one_line(tmp_path):
    save("token model", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "none_such"}))
    with pytest.raises(ValueError, match=r"the settings in config.json of .* make no model: KeyError"):
        outline(tmp_path)
