"""The commands as a user runs them."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import tiny
import yaml

import calm.workflows.quickstart
from calm.cli import main as cli
from calm.data.tokenizer import load_tokenizer
from calm.evaluation import brier_lm
from calm.report.quickstart import write
from calm.training.loop.metrics_log import read_metrics
from calm.utils.files import only_writer
from calm.utils.progress import make_progress
from calm.workflows import quickstart_plan, quickstart_results


def run(monkeypatch, capsys, *arguments):
    """Exit code, output and error output of a command."""
    monkeypatch.setattr(sys, "argv", ["calm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


class KilledError(Exception):
    """A kill in the middle of a quickstart."""


def clock(num_readings=None):
    """Return a clock on which every reading is one second later, and which kills the process that reads on."""
    readings = itertools.count()

    def read():
        now = next(readings)
        if now == num_readings:
            raise KilledError
        return float(now)

    return read


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A real quickstart of a few steps per round, killed after the first model's first round and resumed."""
    directory = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calm.workflows.quickstart, "EVALUATION_BLOCKS", 6)
        patch.setattr(quickstart_results, "SPEED_TOKENS", 8)
        smallest = {"NUM_ROUNDS": 2, "NUM_DECAY_ROUNDS": 1, "MIN_STEPS": 6, "MIN_ROUND_STEPS": 3, "WARMUP_STEPS": 2}
        for name, value in {**smallest, "MAX_OVERTIME": 100}.items():
            patch.setattr(quickstart_plan, name, value)
        # 30 readings measure the speed. Every stage, and every model's part of a round, has two.
        with make_progress() as progress, pytest.raises(KilledError):
            calm.workflows.quickstart.run_quickstart(directory, 1, 0, "cpu", progress, clock(30 + 6 + 2))
        assert (directory / "calm" / "complete.json").exists()
        assert not (directory / "baseline").exists()
        with make_progress() as progress:
            results = calm.workflows.quickstart.run_quickstart(directory, 1, 0, "cpu", progress, clock())
    records = {name: read_metrics(directory / name) for name in calm.workflows.quickstart.MODELS}
    write(results, records, directory, calm.workflows.quickstart.next_command(directory))
    return directory


def test_quickstart_leaves_models_scores_samples_and_a_report(quickstart):
    results = json.loads((quickstart / "results.json").read_text())
    models = ["CALM", "CALM, MTP decoding", "baseline"]
    assert list(results["brier"]) == [*models, "bigram", "unigram"]
    assert results["brier"]["bigram"]["brier"][0] > 0
    for name in models:
        assert results["brier"][name]["brier_lm"] >= 0
        assert results["training"][name]["training_flops"] > 1e9
        assert results["generation_tokens_per_second"][name] > 0
    assert results["steps_per_token"] == {**dict.fromkeys(models[:2], 0.5), "baseline": 1, "bigram": 0, "unigram": 0}
    samples = {(sample["model"], sample["sampler"], sample["temperature"]) for sample in results["samples"]}
    assert ("CALM", "direct", 0.5) in samples
    assert {model for model, _, _ in samples} == set(models)
    trip = results["round_trip"]
    assert trip["num_correct"] == trip["num_tokens"] > 10
    assert "".join(trip["patches"]).strip() == trip["decoded"].strip()
    report = (quickstart / "report.md").read_text()
    assert "BrierLM" in report
    assert "| bigram |" in report
    assert "charts/scores.svg" in report
    assert (quickstart / "charts" / "scores.svg").read_text().startswith("<svg")


def test_quickstart_trains_both_models_in_rounds_on_the_same_tokens(quickstart):
    plan = json.loads((quickstart / "plan.json").read_text())
    results = json.loads((quickstart / "results.json").read_text())
    assert len(plan["rounds"]) == 2
    # The first estimate was six steps; on this clock a step of a round takes less time than a measured one.
    assert [planned["planned_steps"] for planned in plan["rounds"]] == [6, 15]
    assert all(set(planned["seconds"]) == {"calm", "baseline"} for planned in plan["rounds"])
    assert results["training"]["CALM"]["tokens"] == results["training"]["baseline"]["tokens"]
    end = plan["rounds"][-1]["end"]
    assert end == 15
    for name in ("calm", "baseline"):
        assert json.loads((quickstart / name / "complete.json").read_text())["global_step"] == end
    stages = {stage["stage"]: stage for stage in results["stages"]}
    assert list(stages) == ["start", "corpus", "tokenizer", "token files", "train CALM", "train baseline",
                            "scores", "speed and samples"]  # fmt: skip
    assert stages["train CALM"]["steps"] == stages["train baseline"]["steps"] == end
    assert all(stage["seconds"] > 0 for stage in stages.values())


def test_the_next_command_of_the_quickstart_works_in_a_clean_shell(quickstart, tmp_path):
    (command,) = [line for line in (quickstart / "report.md").read_text().splitlines() if " generate " in line]
    environment = {"PATH": os.defpath, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ")


def test_quickstart_started_again_does_nothing_twice(quickstart):
    files = {path: path.stat().st_mtime_ns for path in quickstart.rglob("*") if path.is_file()}
    with make_progress() as progress:
        calm.workflows.quickstart.run_quickstart(quickstart, 1, 0, "cpu", progress)
    assert files == {path: path.stat().st_mtime_ns for path in quickstart.rglob("*") if path.is_file()}


def test_quickstart_with_other_settings_is_refused(quickstart, monkeypatch, capsys):
    code, _, error = run(monkeypatch, capsys, "quickstart", quickstart, "--minutes", "5")
    assert code == 2
    assert "holds a quickstart with" in error
    assert error.strip().count("\n") == 0
    code, _, error = run(monkeypatch, capsys, "quickstart", quickstart.parent / "new", "--minutes", "-1")
    assert code == 2
    assert "--minutes must be a number above 0, got -1." in error
    code, _, error = run(monkeypatch, capsys, "quickstart", quickstart.parent / "new", "--minutes", "0.001")
    assert code == 2
    assert "give --minutes" in error
    assert not (quickstart.parent / "new").exists()


def test_generate_continues_a_prompt(quickstart, monkeypatch, capsys):
    for model in ("calm", "baseline"):
        arguments = ("generate", quickstart / model, "--prompt", "import os", "--max-new-tokens", "9")
        code, first, _ = run(monkeypatch, capsys, *arguments)
        assert code == 0
        assert first.startswith("import os")
        assert first == run(monkeypatch, capsys, *arguments)[1]  # the seed is fixed
        code, _, error = run(monkeypatch, capsys, *arguments[:-1], "99999")
        assert code == 2
        assert "context" in error
        assert "shorten the prompt or request at most" in error
    code, _, _ = run(
        monkeypatch, capsys, "generate", quickstart / "calm", "--sampler", "direct", "--temperature", "0",
        "--max-new-tokens", "3",
    )  # fmt: skip
    assert code == 0


def test_generate_continues_a_file_of_prompts_and_resumes(quickstart, monkeypatch, capsys, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    lines = [{"prompt": "import os\n", "id": 7}, {"prompt": ""}, {"prompt": "def f(x):"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("generate", quickstart / "calm", "--prompts", prompts, "--max-new-tokens", "9")
    arguments = (*arguments, "--temperature", "0.5", "--sampler", "batch", "--num-candidates", "30", "--seed", "5")
    assert run(monkeypatch, capsys, *arguments, "-o", output, "--batch-size", "2")[0] == 0
    texts = [json.loads(line) for line in output.read_text().splitlines()]
    assert [text["prompt"] for text in texts] == [line["prompt"] for line in lines]
    assert texts[0]["id"] == 7
    assert texts[2]["settings"]["seed"] == 7
    for text in texts:
        assert 0 < text["tokens"] <= 9
        assert 2 <= text["samples_per_patch"] <= 30  # two must agree
        assert text["tokens_per_second"] > 0
    # Killed while the second line was written, and started again: the same texts, whatever the batches.
    draft = tmp_path / ".again.jsonl.partial"
    draft.write_bytes(output.read_bytes().splitlines(keepends=True)[0] + b'{"prompt": "", "te')
    assert run(monkeypatch, capsys, *arguments, "-o", tmp_path / "again.jsonl", "--batch-size", "1")[0] == 0
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert [text["text"] for text in again] == [text["text"] for text in texts]
    assert not draft.exists()
    # With other settings, the unfinished output is not mixed with new lines.
    draft.write_bytes(output.read_bytes().splitlines(keepends=True)[0])
    (tmp_path / "again.jsonl").unlink()
    code, _, error = run(monkeypatch, capsys, *arguments, "-o", tmp_path / "again.jsonl", "--seed", "6")
    assert code == 2
    assert "unfinished output of other prompts or settings" in error
    code, _, error = run(monkeypatch, capsys, "generate", quickstart / "baseline", *arguments[2:6],
                         "-o", tmp_path / "again.jsonl", "--seed", "5")  # fmt: skip
    assert code == 2
    assert "unfinished output of other prompts or settings" in error
    # The baseline takes the same file.
    arguments = ("generate", quickstart / "baseline", "--prompts", prompts, "-o", tmp_path / "baseline.jsonl")
    assert run(monkeypatch, capsys, *arguments, "--max-new-tokens", "5")[0] == 0
    assert len((tmp_path / "baseline.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', (), 'line 2 has no text "prompt"'),
        ("import os\n", (), "line 1 is not JSON"),
        ('{"prompt": "a", "text": "mine"}\n', (), "line 1 has a field 'text', which the result would replace"),
        ('{"prompt": "\\ud800"}\n', (), "line 1 has half of a surrogate pair"),
        ('{"prompt": "a"}\n\n{"prompt": "b", "id": "\\ud800"}\n', (), "line 3 has half of a surrogate pair"),
        ('{"prompt": "a"}\n' + '{"prompt": "%s"}\n' % ("ab " * 9000), (), "line 2: a prompt of"),
        ('{"prompt": "a"}\n', ("--prompt", "b"), "replaces --prompt"),
        ('{"prompt": "a"}\n', ("--temperature", "nan"), "temperature must be at least 0"),
    ],
)
def test_generate_refuses_files_it_cannot_read(quickstart, monkeypatch, capsys, tmp_path, content, arguments, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    arguments = ("generate", quickstart / "calm", "--prompts", path, "-o", tmp_path / "out.jsonl", *arguments)
    code, _, error = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in error.strip().splitlines()[-1]  # above it at most a progress bar
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_evaluate_scores_models_side_by_side(quickstart, monkeypatch, capsys, tmp_path):
    autoencoder = tmp_path / "autoencoder"
    tiny.autoencoder(2, vocab_size=1024).save_pretrained(autoencoder)
    load_tokenizer(quickstart / "tokenizer").save_pretrained(autoencoder)
    code, out, _ = run(
        monkeypatch, capsys, "evaluate", quickstart / "calm", quickstart / "baseline", autoencoder,
        "--data", quickstart / "data" / "validation", "--block-size", "64", "--blocks", "4", "--samples", "2",
        "--output", tmp_path / "scores" / "scores.json",
    )  # fmt: skip
    assert code == 0
    assert "BrierLM" in out
    assert "brings back" in out
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())["models"]
    assert len(scores) == 3
    calm, baseline = scores[str(quickstart / "calm")], scores[str(quickstart / "baseline")]
    assert calm["num_positions"] == baseline["num_positions"]
    assert f"{baseline['brier_lm'] - calm['brier_lm']:+z.2f}" in out.split("difference to the first model")[1]
    assert "±" not in out  # four blocks are too few for a standard error
    assert "-0.00" not in out


def test_evaluate_keeps_what_is_scored_when_it_is_stopped(quickstart, monkeypatch, capsys, tmp_path):
    score, scored = brier_lm.evaluate_brier, []

    def stopped_at_the_second(model, *arguments, **settings):
        if scored:
            raise KeyboardInterrupt
        scored.append(model)
        return score(model, *arguments, **settings)

    monkeypatch.setattr(brier_lm, "evaluate_brier", stopped_at_the_second)
    code, _, _ = run(
        monkeypatch, capsys, "evaluate", quickstart / "baseline", quickstart / "calm",
        "--data", quickstart / "data" / "validation", "--block-size", "64", "--blocks", "2", "--samples", "2",
        "--output", tmp_path / "scores.json",
    )  # fmt: skip
    assert code == 130
    assert list(json.loads((tmp_path / "scores.json").read_text())["models"]) == [str(quickstart / "baseline")]


def test_two_evaluations_do_not_write_the_same_file(monkeypatch, capsys, tmp_path):
    for option, name in (("--output", "scores.json"), ("--plot", "scores.png")):
        with only_writer(tmp_path / name):
            code, _, error = run(monkeypatch, capsys, "evaluate", "x", "--data", "y", option, tmp_path / name)
        assert code == 2
        assert f"another process is writing {tmp_path / name}: wait for it" in error


def test_evaluate_draws_models_at_their_temperatures(quickstart, monkeypatch, capsys, tmp_path):
    code, _, _ = run(
        monkeypatch, capsys, "evaluate", quickstart / "calm", quickstart / "baseline",
        "--data", quickstart / "data" / "validation", "--block-size", "64", "--blocks", "2", "--samples", "2",
        "--temperature", "1", "--temperature", "0.5", "--num-candidates", "20",
        "--plot", tmp_path / "plots" / "t.png", "--output", tmp_path / "scores.json",
    )  # fmt: skip
    assert code == 0
    assert (tmp_path / "plots" / "t.png").read_bytes().startswith(b"\x89PNG")
    scores = json.loads((tmp_path / "scores.json").read_text())["models"]
    assert [score["temperature"] for score in scores.values()] == [1, 0.5, 1, 0.5]
    baseline = [score["collision"][0] for score in scores.values() if score["model"].endswith("baseline")]
    assert baseline[1] > baseline[0]


def test_evaluate_scores_heads_and_what_takes_their_place(quickstart, monkeypatch, capsys, tmp_path):
    arguments = (
        "evaluate", quickstart / "baseline", quickstart / "calm", "--data", quickstart / "data" / "validation",
        "--block-size", "64", "--blocks", "2", "--samples", "2", "--output", tmp_path / "scores.json",
    )  # fmt: skip
    code, _, error = run(monkeypatch, capsys, *arguments, "--sampler", "batch", "--sampler", "bogus")
    assert code == 2
    assert "sampler must be one of batch, exact, direct, mtp, got 'bogus'" in error
    assert "score" not in error  # before anything is scored
    how = ("--sampler", "batch", "--sampler", "mtp", "--plot", tmp_path / "p.png")
    assert run(monkeypatch, capsys, *arguments, *how)[0] == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["models"]
    model = str(quickstart / "calm")
    assert list(scores) == [str(quickstart / "baseline"), model, f"{model} (mtp)"]
    assert [score["sampler"] for score in scores.values()] == [None, "batch", "mtp"]
    assert scores[model]["num_positions"] == scores[f"{model} (mtp)"]["num_positions"]


def test_the_papers_protocol_is_chosen_by_name(quickstart, monkeypatch, capsys, tmp_path):
    arguments = ("evaluate", quickstart / "calm", quickstart / "baseline", "--data", quickstart / "data" / "validation")
    arguments = (*arguments, "--protocol", "paper")
    code, _, _ = run(
        monkeypatch, capsys, *arguments, "--blocks", "1", "--samples", "2", "--output", tmp_path / "scores.json"
    )
    assert code == 0
    calm, baseline = json.loads((tmp_path / "scores.json").read_text())["models"].values()
    assert (calm["block_size"], calm["stride"], calm["protocol"]) == (2 * 2048, 2, "paper")
    assert (baseline["block_size"], baseline["stride"]) == (2048, 1)
    code, _, error = run(monkeypatch, capsys, *arguments, "--block-size", "64")
    assert code == 2
    assert "--protocol paper sets block size and stride itself" in error


def test_the_commands_of_the_guide_work_from_text_to_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    assert (
        run(monkeypatch, capsys, "tokenizer", "train", tmp_path, "-o", tmp_path / "tok", "--vocab-size", "270")[0] == 0
    )
    code, out, _ = run(
        monkeypatch, capsys, "prepare", tmp_path / "text.txt", "--tokenizer", tmp_path / "tok", "-o", tmp_path / "data"
    )
    assert code == 0
    assert "of 1 documents" in out
    recipe = {
        "stage": "baseline",
        "output_dir": str(tmp_path / "model"),
        "data": {"train": str(tmp_path / "data"), "block_size": 32},
        "model": {
            "backbone": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        },
        "training": {"per_device_train_batch_size": 2, "use_cpu": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, out, _ = run(monkeypatch, capsys, "train", tmp_path / "recipe.yaml", "training.max_steps=2")
    assert (code, out) == (0, f"trained: {tmp_path / 'model'}\n")
    code, out, _ = run(monkeypatch, capsys, "train", tmp_path / "recipe.yaml", "training.max_steps=2")
    assert out.startswith("already complete")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nowhere.yaml"), "no recipe at nowhere.yaml"),
        (("generate", "no/such/model"), "no model at no/such/model"),
        (("prepare", "nowhere.txt", "--tokenizer", "no/such/dir", "-o", "y"), "no tokenizer at no/such/dir"),
        (("tokenizer", "train", "nowhere.txt", "-o", "never"), "no such file or folder: nowhere.txt"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert error.startswith("calm: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_temperature_outside_the_range_is_refused(quickstart, monkeypatch, capsys):
    arguments = ("generate", quickstart / "calm", "--sampler", "batch", "--temperature", "0")
    code, _, error = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "temperature must be in (0, 1], got 0.0" in error


def test_data_of_another_tokenizer_are_refused(quickstart, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    run(monkeypatch, capsys, "tokenizer", "train", tmp_path, "-o", tmp_path / "tok", "--vocab-size", "270")
    run(monkeypatch, capsys, "prepare", tmp_path / "text.txt", "--tokenizer", tmp_path / "tok", "-o", tmp_path / "data")
    code, _, error = run(
        monkeypatch, capsys, "evaluate", quickstart / "calm", "--data", tmp_path / "data", "--block-size", "16"
    )
    assert code == 2
    assert "was not prepared with the tokenizer of" in error


def test_help_teaches():
    out = subprocess.run(
        [sys.executable, "-m", "calm.cli.main", "prepare", "--help"], capture_output=True, text=True, check=True
    )
    assert "Example" in out.stdout
