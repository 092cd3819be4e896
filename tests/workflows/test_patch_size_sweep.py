"""A real, tiny sweep over K, interrupted and taken up again."""

import json
import sys

import pytest

from calm.cli.main import main
from calm.data.prepare import prepare
from calm.data.tokenizer import train_tokenizer
from calm.workflows.patch_size_sweep import bandwidth_plan
from calm.workflows.study import run as study_run
from calm.workflows.study import run_study

DOCUMENTS = [" ".join(["alpha", "beta", "gamma", "delta"][(i + j) % 4] for j in range(60)) for i in range(30)]
TRAINING = "training:\n  max_steps: 4\n  per_device_train_batch_size: 2\n  use_cpu: true\n  warmup_steps: 0\n"
BACKBONE = "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2}"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    prepare([root / "text.jsonl"], train_tokenizer(DOCUMENTS, 270), root / "data")
    data = f"data: {{train: {root}/data, validation: {root}/data, block_size: 36}}\noutput_dir: unused\n"
    models = {
        "autoencoder": "{hidden_size: 16, intermediate_size: 24, latent_size: 8}",
        "calm": f"{{autoencoder: unused, backbone: {BACKBONE}, head: {{num_mlp_layers: 1, num_samples: 2}}}}",
        "baseline": f"{{backbone: {BACKBONE}}}",
    }
    for stage, model in models.items():
        (root / f"{stage}.yaml").write_text(f"stage: {stage}\n{data}model: {model}\n{TRAINING}")
    return root


def test_another_k_joins_the_points_that_are_there(family, tmp_path, monkeypatch):
    run, trained = tmp_path / "run", []
    train = study_run.train
    monkeypatch.setattr(study_run, "train", lambda recipe, _: trained.append(recipe.output_dir) or train(recipe))
    overrides = ["training.learning_rate=1e-3"]
    text = run_study(bandwidth_plan(family, [3, 1], num_blocks=4), run, overrides).read_text()
    names = ["baseline", "autoencoder_k1", "calm_k1", "autoencoder_k3", "calm_k3"]
    assert [path.split("/")[-1] for path in trained] == names
    scores = [json.loads((run / name / "score.json").read_text()) for name in ("baseline", "calm_k1", "calm_k3")]
    assert [score["patch_size"] for score in scores] == [None, 1, 3]
    assert len({score["data_sha256"] for score in scores}) == 1
    assert {score["stride"] for score in scores} == {3}
    assert scores[2]["inference_flops_per_token"] < scores[1]["inference_flops_per_token"]
    assert (run / "plot_1.png").read_bytes().startswith(b"\x89PNG")
    assert "| CALM, K = 3 |" in text

    # All are scored on the n-grams that the new one has as well, and none is trained twice.
    weights = {name: (run / name / "model.safetensors").stat().st_mtime_ns for name in names}
    text = run_study(bandwidth_plan(family, [1, 2, 3], num_blocks=4), run, overrides).read_text()
    assert weights == {name: (run / name / "model.safetensors").stat().st_mtime_ns for name in names}
    assert {json.loads(path.read_text())["evaluation"]["stride"] for path in run.glob("*/score.json")} == {6}
    assert "| CALM, K = 2 |" in text
    # Another recipe is not passed off as the old one's score.
    with pytest.raises(ValueError, match=r"holds a run of another recipe: training.max_steps"):
        run_study(bandwidth_plan(family, [1, 3], num_blocks=4), run, [*overrides, "training.max_steps=5"])


def test_the_command_prints_the_table(family, tmp_path, monkeypatch, capsys):
    arguments = ["calm", "bandwidth", str(family), "-o", str(tmp_path / "run"), "-k", "2", "--blocks", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert "| token model |" in capsys.readouterr().out


def test_an_incomplete_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no calm.yaml in .*: a family of recipes has"):
        bandwidth_plan(tmp_path, [2])


@pytest.mark.parametrize(
    ("patch_sizes", "overrides", "message"),
    [
        ([1, 5], [], "block_size must be a multiple of the patch size 5, got 36"),
        (
            [4, 9],
            ["data.block_size=36"],
            "block_size of 36 holds nothing to score at a stride of 36 .* at least 72",
        ),
        ([1, 2], ["data.validation=null"], "model baseline: its recipe needs data.validation"),
    ],
)
def test_what_could_not_be_scored_is_refused_before_it_is_trained(family, tmp_path, patch_sizes, overrides, message):
    with pytest.raises(ValueError, match=message):
        run_study(bandwidth_plan(family, patch_sizes), tmp_path / "run", overrides)
    assert not (tmp_path / "run").exists()
