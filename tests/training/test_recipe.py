import copy
from pathlib import Path

import pytest
import yaml

from calm import CalmAutoencoderConfig
from calm.training.recipe.recipe import TRAINING_DEFAULTS, Recipe
from calm.training.recipe.reference import documented_arguments, recipe_reference
from calm.training.recipe.trainer_arguments import accumulation_steps, trained_tokens, training_arguments

MINIMAL = """
stage: autoencoder
output_dir: runs/x
data: {train: data/train, block_size: 64}
training: {learning_rate: 1e-3}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_numbers_read_as_everyone_means_them(recipe):
    assert Recipe.load(recipe).training["learning_rate"] == 1e-3
    loaded = Recipe.load(recipe, ["training.weight_decay=1e-2", "data.block_size=128", "model.kl_weight=.5"])
    assert (loaded.training["weight_decay"], loaded.data.block_size, loaded.model.config["kl_weight"]) == (
        0.01,
        128,
        0.5,
    )


def test_defaults_are_the_papers_optimiser(recipe):
    training = Recipe.load(recipe).training
    assert (training["adam_beta2"], training["weight_decay"], training["max_grad_norm"]) == (0.95, 0.1, 1.0)
    assert training.keys() == TRAINING_DEFAULTS.keys()


def test_resolved_recipe_loads_as_itself(recipe, tmp_path):
    loaded = Recipe.load(recipe, ["seed=7"])
    (tmp_path / "resolved.yaml").write_text(loaded.to_yaml())
    assert Recipe.load(tmp_path / "resolved.yaml") == loaded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "unknown key 'learning_rat' in training: did you mean 'learning_rate'?"),
        ("model.latent_sise=3", "unknown key 'latent_sise' in model: did you mean 'latent_size'?"),
        ("dta.train=x", "unknown key 'dta' in the recipe: did you mean 'data'?"),
        ("data.blok_size=3", "unknown key 'blok_size' in data: did you mean 'block_size'?"),
        ("stage=distil", "stage must be one of autoencoder, calm, baseline, got 'distil'"),
        ("training.output_dir=x", "training.output_dir has no place in a recipe"),
        ("seed", "an override reads dotted.key=value, got 'seed'"),
        ("seed.x=1", "'seed' is a value"),
        ("stage=baseline", "stage baseline needs model.backbone"),
        ("output_dir=2026-11-23", "output_dir in the recipe must be of type str"),
        ("data.block_size=abc", "block_size in data must be of type int, got 'abc'"),
        ("output_dir=@x", "'@x' is not valid YAML"),
        ("brier_blocks=4", "brier_blocks, at least 1, is for language models"),
    ],
)
def test_mistakes_are_named(recipe, override, message):
    recipe.write_text(MINIMAL + "seed: 0\n")
    with pytest.raises(ValueError) as error:
        Recipe.load(recipe, [override])
    assert message in str(error.value)


def test_a_bare_no_is_the_strategy(recipe):
    assert Recipe.load(recipe, ["training.eval_strategy=no"]).training["eval_strategy"] == "no"


def test_backbone_fields_are_checked(recipe):
    with pytest.raises(ValueError, match=r"unknown key 'hiden_size' in model\.backbone: did you mean 'hidden_size'"):
        Recipe.load(recipe, ["stage=baseline", "model.backbone.hiden_size=64"])
    with pytest.raises(ValueError, match=r"unknown key 'num_sample' in model\.head: did you mean 'num_samples'"):
        Recipe.load(recipe, ["stage=calm", "model.backbone.hidden_size=8", "model.head.num_sample=4"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: [", "is not valid YAML"),
        ("- a", "must be a mapping"),
        ("stage: calm\noutput_dir: x", "lacks 'data'"),
        ("stage: calm\noutput_dir: x\ndata: {train: x}", "data lacks 'block_size'"),
    ],
)
def test_unreadable_recipes_are_refused(recipe, text, message):
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.load(recipe)
    with pytest.raises(ValueError, match="no recipe at"):
        Recipe.load(recipe.with_name("other.yaml"))


def nested_aliases(levels):
    lists = [f"&a{level} [{', '.join([f'*a{level - 1}' if level else 'x'] * 10)}]" for level in range(levels)]
    return f"[{', '.join(lists)}]"


def test_a_recipe_that_expands_without_end_is_refused(recipe):
    recipe.write_text(MINIMAL + f"training: {{learning_rate: {nested_aliases(9)}}}\n")
    with pytest.raises(ValueError, match="has aliases that expand to more than 10,000 values"):
        Recipe.load(recipe)
    recipe.write_text(MINIMAL)
    with pytest.raises(ValueError, match="has aliases that expand to more than 10,000 values"):
        Recipe.load(recipe, [f"training.learning_rate={nested_aliases(9)}"])
    recipe.write_text(MINIMAL + "model: &m {patch_size: 4}\ntraining: {learning_rate: &r 1e-3, weight_decay: *r}\n")
    assert Recipe.load(recipe).training["weight_decay"] == 1e-3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 20000, "is nested too deeply"),
        ("{a: " * 20000, "is nested too deeply"),
        ("&a [*a]", "has an alias of a value within that value"),
        ("2026-99-99", "is not valid YAML"),
        ("9" * 10000, "is not valid YAML"),
        ("x" * 2_000_000, "has 2,"),
    ],
)
def test_what_no_recipe_needs_is_refused_in_one_short_line(recipe, value, message):
    recipe.write_text(MINIMAL + f"training: {{learning_rate: {value}}}\n")
    with pytest.raises(ValueError, match=message) as error:
        Recipe.load(recipe)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.report_to=[[tensorboard]]", r"report_to must be a value or a list of values, got a list of list"),
        ("training.report_to={a: b}", "report_to must be a value, got a mapping"),
        ("training.fsdp=[1]", "do not fit transformers"),
        ("training.accelerator_config=[x]", "do not fit transformers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_setting_of_another_type_is_refused(recipe, override, message):
    recipe.write_text(MINIMAL)
    with pytest.raises(ValueError, match=message):
        training_arguments(Recipe.load(recipe, [override]))


def test_brier_blocks_want_evaluations(recipe):
    stage = ["stage=baseline", "model={backbone: {hidden_size: 8}}", "data.validation=x", "brier_blocks=2"]
    training_arguments(Recipe.load(recipe, stage))
    for no in ("no", "false"):
        given = Recipe.load(recipe, [*stage, f"training.eval_strategy={no}"])  # a finished run's can still be read
        with pytest.raises(ValueError, match=r"eval_strategy is no: add training\.eval_strategy=steps"):
            training_arguments(given)


def test_the_packages_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("recipes/paper/calm_m.yaml").stage == "calm"
    with pytest.raises(ValueError, match=r"no recipe at recipes/paper/calm_z\.yaml"):
        Recipe.load("recipes/paper/calm_z.yaml")
    with pytest.raises(ValueError, match=r"no recipe at __init__\.py"):
        Recipe.load("__init__.py")
    # The working directory's own comes first.
    own = tmp_path / "recipes" / "paper"
    own.mkdir(parents=True)
    (own / "calm_m.yaml").write_text(MINIMAL)
    assert Recipe.load("recipes/paper/calm_m.yaml").stage == "autoencoder"


def test_shipped_recipes_load():
    paths = sorted(path for path in Path("recipes").rglob("*.yaml") if path.parent.name != "study")  # its are plans
    assert len(paths) >= 3
    for path in paths:
        Recipe.load(path)


def test_tokens_per_step_sets_the_accumulation(recipe):
    loaded = Recipe.load(recipe, ["tokens_per_step=2048", "training.per_device_train_batch_size=2"])
    assert training_arguments(loaded).gradient_accumulation_steps == 16
    assert accumulation_steps(loaded, num_processes=4) == 4
    assert trained_tokens(loaded, 10) == 20480
    with pytest.raises(
        ValueError, match=r"tokens_per_step \(2048\) must be a multiple of the 384 tokens that 3 process"
    ):
        accumulation_steps(loaded, num_processes=3)
    with pytest.raises(ValueError, match=r"tokens_per_step or training.gradient_accumulation_steps, not both"):
        Recipe.load(recipe, ["tokens_per_step=2048", "training.gradient_accumulation_steps=2"])


CALM = {
    "stage": "calm",
    "output_dir": "runs/x",
    "data": {"train": "data/train", "block_size": 64},
    "model": {"autoencoder": "runs/a", "backbone": {"hidden_size": 8, "num_attention_heads": 2}},
}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training", 5, "training must be a mapping of keys, got 5"),
        ("training.use_cpu", "yes", "training.use_cpu must be true or false, got 'yes'"),
        ("training.save_total_limit", "x", "training.save_total_limit must be a number, got 'x'"),
        ("training.per_device_train_batch_size", 0, "training.per_device_train_batch_size must be at least 1, got 0"),
        ("training.gradient_accumulation_steps", 0, "training.gradient_accumulation_steps must be at least 1, got 0"),
        ("training.max_steps", 0, "training.max_steps must be at least 1, or -1"),
        ("training.label_smoothing_factor", 0.1, "training.label_smoothing_factor has no place in a recipe"),
        ("tokens_per_step", 0, "tokens_per_step must be at least 1, got 0"),
        ("data.validation", 5, "validation in data must be of type str, got 5"),
        ("model.autoencoder", None, "model.autoencoder must name a directory or hub id, got None"),
        ("model.backbone_weights", 5, "model.backbone_weights must name a directory or hub id, got 5"),
        ("model.backbone", 5, "model.backbone must be a mapping of its configuration's fields, got 5"),
        ("model.head", "flow", "model.head must be a mapping of its configuration's fields, got 'flow'"),
        ("model.backbone.num_hidden_layers", -1, "model.backbone.num_hidden_layers must be a whole number, at least 1"),
        ("model.backbone.hidden_size", 2.5, "model.backbone.hidden_size must be a whole number, at least 1, got 2.5"),
        ("model.backbone.num_key_value_heads", 3, "num_key_value_heads (3) must divide num_attention_heads (2)"),
        ("model.backbone.model_type", "qwen3", "num_key_value_heads (32) must divide num_attention_heads (2)"),
        ("model.backbone.model_type", "lama", "model.backbone.model_type 'lama' is unknown: did you mean llama"),
        ("model.backbone", {"model_type": "gemma2", "num_hiden_layers": 7}, "did you mean 'num_hidden_layers'"),
        ("training.max_steps", -5, "training.max_steps must be at least -1, got -5"),
        ("training.logging_steps", 0, "training.logging_steps must be above 0, got 0"),
    ],
)
def test_values_of_the_wrong_kind_are_named(path, value, message):
    values = copy.deepcopy(CALM)
    *groups, last = path.split(".")
    node = values
    for group in groups:
        node = node.setdefault(group, {})
    node[last] = value
    with pytest.raises(ValueError) as error:
        Recipe.from_dict(values)
    assert message in str(error.value)


def test_removed_keys_are_ignored_with_a_warning_where_they_had_an_effect():
    values = copy.deepcopy(CALM)
    values["distillation"] = None
    values["model"]["head"] = {"type": "energy", "num_latent_groups": 1, "mean_pull_weight": 0.0}
    assert Recipe.from_dict(values).model.head == {"type": "energy"}  # as every finished run has it
    with pytest.warns(FutureWarning, match="the recipe: distillation was removed and is ignored"):
        Recipe.from_dict(values | {"distillation": {"teacher": "runs/baseline"}})
    values["model"]["head"]["num_latent_groups"] = 16
    with pytest.warns(FutureWarning, match=r"model\.head: num_latent_groups was removed and is ignored \(it was 16\)"):
        Recipe.from_dict(values)


def test_former_keys_of_the_model_still_work_with_a_warning(tmp_path):
    former, values = tmp_path / "former.yaml", copy.deepcopy(CALM)
    values["model"] |= {"token_prediction_weight": 3.0, "token_prediction_type": "autoregressive"}
    former.write_text(yaml.safe_dump(values))
    with pytest.warns(FutureWarning) as warned:
        recipe = Recipe.load(former, ["model.mtp_weight=2.0"])
    assert [str(each.message).partition(";")[0] for each in warned] == [
        "model: token_prediction_weight is now called mtp_weight",
        "model: token_prediction_type is now called mtp_type",
    ]
    assert (recipe.model.mtp_weight, recipe.model.mtp_type) == (2.0, "autoregressive")
    former.write_text(recipe.to_yaml())
    with pytest.warns(FutureWarning, match="model: token_prediction_weight is now called mtp_weight"):
        assert Recipe.load(former, ["model.token_prediction_weight=1.0"]).model.mtp_weight == 1.0
    with pytest.warns(FutureWarning, match="recipe is now called recipes/single_gpu/head_finetune.yaml"):
        assert Recipe.load("recipes/single_gpu/finish.yaml").model.decoded_brier_weight == 20


def test_the_reference_has_every_key_of_the_shipped_recipes_with_a_text():
    text = recipe_reference()
    for path in Path("recipes").rglob("*.yaml"):
        if path.parent.name == "study":
            continue
        recipe = Recipe.load(path)
        values = recipe.to_dict()
        keys = [*values, *(f"data.{name}" for name in values["data"]), *(f"model.{name}" for name in values["model"])]
        keys += [f"model.head.{name}" for name in values["model"].get("head", {})]
        for key in keys:
            assert f"| `{key}` |" in text, (path, key)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `") and "| `training." not in line]
    assert len(rows) > 70
    assert all(len(row) == 4 and len(row[3]) > 3 for row in rows)
    assert documented_arguments(CalmAutoencoderConfig)["kl_clip"] == "floor of each dimension's KL in nats."


@pytest.mark.parametrize("nothing", ["null", "false", "none", "[]"])
def test_a_run_may_report_to_nobody(recipe, nothing):
    assert training_arguments(Recipe.load(recipe, [f"training.report_to={nothing}"])).report_to == []


def test_the_best_checkpoint_is_told_by_what_is_measured(recipe):
    given = ["training.metric_for_best_model=brier_lm", "data.validation=data/validation", "training.use_cpu=true"]
    with pytest.raises(ValueError, match="must be one of loss, got 'brier_lm'; the recipe's brier_blocks would"):
        training_arguments(Recipe.load(recipe, given))
    recipe.write_text(MINIMAL.replace("autoencoder", "baseline") + "model: {backbone: {hidden_size: 8}}")
    training_arguments(Recipe.load(recipe, [*given, "brier_blocks=2"]))
