"""A real, tiny sweep over K, interrupted and taken up again."""

import json
import sys

import pytest

from calm import bandwidth
from calm.bandwidth import run_bandwidth
from calm.cli.main import main
from calm.data.prepare import prepare
from calm.data.tokenizer import train_tokenizer

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


def test_every_point_is_trained_scored_and_drawn_once(family, tmp_path, monkeypatch):
    run, trained = tmp_path / "run", []
    train = bandwidth.train
    monkeypatch.setattr(bandwidth, "train", lambda recipe, _: trained.append(recipe.output_dir) or train(recipe))
    points = run_bandwidth(family, run, [1, 3], ["training.learning_rate=1e-3"], num_blocks=4)
    assert [point["patch_size"] for point in points] == [None, 1, 3]
    assert len({point["data_sha256"] for point in points}) == 1
    assert {point["stride"] for point in points} == {3}
    assert points[2]["inference_flops_per_token"] < points[1]["inference_flops_per_token"]
    assert (run / "bandwidth.png").read_bytes().startswith(b"\x89PNG")
    assert "| K = 3 |" in (run / "bandwidth.md").read_text()
    assert len(trained) == 5

    # A point that is lost is made again, and that point alone.
    (run / "k3" / "score.json").unlink()
    trained.clear()
    assert run_bandwidth(family, run, [1, 3], ["training.learning_rate=1e-3"], num_blocks=4)[2] | {"seconds": 0} == (
        points[2] | {"seconds": 0}
    )
    assert {name.split("/")[-2] for name in trained} == {"k3"}

    # Points on other n-grams do not stand in one plot.
    with pytest.raises(ValueError, match=r"scored with different stride \(3, 6\)"):
        run_bandwidth(family, run, [1, 2, 3], ["training.learning_rate=1e-3"], num_blocks=4)


def test_the_command_prints_the_table(family, tmp_path, monkeypatch, capsys):
    arguments = ["calm", "bandwidth", str(family), "-o", str(tmp_path / "run"), "-k", "2", "--blocks", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert "| token model |" in capsys.readouterr().out


def test_an_incomplete_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no autoencoder.yaml in .*: a family of recipes has"):
        run_bandwidth(tmp_path, tmp_path / "run", [2])


@pytest.mark.parametrize(
    ("patch_sizes", "overrides", "message"),
    [
        ([1, 5], [], "block_size must be a multiple of the patch size 5, got 36"),
        (
            [4, 9],
            ["data.block_size=36"],
            "block_size of 36 holds nothing to score at a stride of 36 .* at least 72",
        ),
        ([1, 2], ["data.validation=null"], "model calm: its recipe needs data.validation"),
    ],
)
def test_what_could_not_be_scored_is_refused_before_it_is_trained(family, tmp_path, patch_sizes, overrides, message):
    with pytest.raises(ValueError, match=message):
        run_bandwidth(family, tmp_path / "run", patch_sizes, overrides)
    assert not (tmp_path / "run").exists()
