"""Paths and ids of the hub are told apart, and a mistyped path is answered with the nearest that exists."""

import pytest

from calm.checkpoints.loading import load_model
from calm.data.blocks import read_manifest
from calm.data.sources import find_sources
from calm.data.tokenizer import load_tokenizer
from calm.training.recipe.models import outline_model
from calm.training.recipe.recipe import Recipe, find_recipe
from calm.utils.paths import did_you_mean, looks_local, nearest_existing
from calm.workflows.patch_size_sweep import bandwidth_plan
from calm.workflows.study import Plan


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    (tmp_path / "runs" / "calm").mkdir(parents=True)
    (tmp_path / "runs" / "data.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["./gpt2", "../x/y", "/no/such", "~/model", "runs/clam", "runs/calm/", "runs/a/"])
def test_what_looks_like_a_path_is_local(name):
    assert looks_local(name)


@pytest.mark.parametrize("name", ["gpt2", "cccczshao/CALM-M", "meta-llama/Llama-3.2-1B"])
def test_what_looks_like_an_id_of_the_hub_is_none(name):
    assert not looks_local(name)


def test_the_nearest_existing_path_is_found_part_by_part(tmp_path):
    assert nearest_existing("rusn/clam") == "runs/calm"
    assert nearest_existing(tmp_path / "run" / "cal") == str(tmp_path / "runs" / "calm")
    assert nearest_existing("runs/zzz") is None
    assert nearest_existing("runs/data.jsonl/x") is None
    assert nearest_existing("runs/calm") is None  # it exists
    assert (did_you_mean("runs/clam"), did_you_mean("zzz")) == ("; did you mean runs/calm?", ".")


def test_a_mistyped_path_of_a_model_is_not_looked_up_on_the_hub():
    with pytest.raises(
        ValueError, match=r"^no model at runs/clam: there is no such directory; did you mean runs/calm\?$"
    ):
        load_model("runs/clam")


def test_mistyped_paths_of_tokenizers_documents_and_data_name_the_nearest():
    with pytest.raises(ValueError, match=r"no tokenizer at runs/clam: .*; did you mean runs/calm\?"):
        load_tokenizer("runs/clam")
    with pytest.raises(ValueError, match=r"no tokenizer at clam: there is no such file"):
        load_tokenizer("./clam")
    with pytest.raises(ValueError, match=r"no such file or folder: runs/data.json; did you mean runs/data.jsonl\?"):
        find_sources(["runs/data.json"])
    with pytest.raises(ValueError, match=r"no prepared data at runs/clam: .*; did you mean runs/calm\?"):
        read_manifest("runs/clam")


def test_recipes_plans_and_families_are_found_by_name_and_mistyped_ones_name_the_nearest(tmp_path):
    assert Recipe.load("recipes/paper/calm_m.yaml").stage == "calm"
    plan = Plan.load("recipes/study/cpu.yaml")
    assert plan.recipe("paper-m", tmp_path).stage == "calm"
    assert "calm_k2" in bandwidth_plan("recipes/quickstart", [2]).models
    for kind, name, near in (
        ("recipe", "recipes/paper/clam_m.yaml", "recipes/paper/calm_m.yaml"),
        ("recipe", "paper/calm_m", "recipes/paper/calm_m.yaml"),
        ("recipe", "recipes/single_gpu/autoencoder", "recipes/single_gpu/autoencoder.yaml"),
        ("plan", "recipes/study/gpu", "recipes/study/gpu.yaml"),
        ("family of recipes", "recipes/quikstart", "recipes/quickstart"),
    ):
        with pytest.raises(ValueError) as error:
            find_recipe(name, kind)
        assert str(error.value) == f"no {kind} at {name}; did you mean {near}?"


def test_a_model_that_a_recipe_names_and_that_is_missing_is_named_by_its_key():
    sizes = ["model.backbone.vocab_size=100"]
    with pytest.raises(ValueError, match=r"^model\.autoencoder: there is no model in nowhere yet"):
        outline_model(Recipe.load("recipes/paper/calm_m.yaml", ["model.autoencoder=nowhere", *sizes]))
    with pytest.raises(ValueError, match=r"^model\.pretrained: there is no model in nowhere yet"):
        outline_model(Recipe.load("recipes/paper/calm_m.yaml", ["model={pretrained: nowhere}"]))


def test_a_key_of_another_section_is_suggested_with_its_section():
    for override, near in (
        ("learning_rate=1e-3", "training.learning_rate"),
        ("train=x", "data.train"),
        ("head={type: flow}", "model.head"),
        ("trainig={}", "training"),
    ):
        with pytest.raises(ValueError, match=f"in the recipe: did you mean '{near}'"):
            Recipe.load("recipes/quickstart/calm.yaml", [override])
