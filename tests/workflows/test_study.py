"""A real, tiny study: trained, scored, reported; interrupted and taken up again."""

import json
import subprocess
import sys

import pytest
import yaml
from filelock import FileLock
from test_patch_size_sweep import family  # noqa: F401

from calm.cli.main import main
from calm.evaluation.statistics import brier_difference
from calm.report.study import _apart, write_report
from calm.report.tables import brier_cell, difference_cell
from calm.training.loop.metrics_log import read_metrics
from calm.workflows.study import Plan, run_study, study_cost
from calm.workflows.study import run as study_run
from calm.workflows.study import score as study_score

PLAN = {
    "evaluation": {"stride": 6, "num_blocks": 4, "num_samples": 2},
    "set": {"training.learning_rate": 1e-3},
    "models": {
        "teacher": {"label": "token model", "recipe": "baseline.yaml"},
        "autoencoder": {"recipe": "autoencoder.yaml", "set": {"model.patch_size": 3}},
        "plain": {"label": "CALM", "recipe": "calm.yaml", "set": {"model.autoencoder": "@autoencoder"}},
        "warm": {
            "recipe": "calm.yaml",
            "set": {
                "model.autoencoder": "@autoencoder",
                "model.mtp_weight": 1.0,
                "model.backbone_weights": "@teacher",
            },
        },
    },
    "fluency": {
        "judge": "teacher", "models": ["teacher", "plain", "warm:mtp"], "temperatures": [1.0, 0.5],
        "num_texts": 4, "prompt_tokens": 6, "new_tokens": 12,
    },
    "report": [
        {"title": "Frontier", "text": "Who wins.", "lines": {"CALM": ["plain", "warm"], "token": ["teacher"]}},
        {"title": "Autoencoders", "rows": ["autoencoder"]},
        {"title": "Changes", "rows": ["autoencoder", "plain", "warm", "warm:mtp"]},
    ],
}  # fmt: skip


def write(folder, **changes):
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
    return path


def test_every_model_is_trained_and_scored_once_and_reported(family, tmp_path, monkeypatch):  # noqa: F811
    trained, train = [], study_run.train
    monkeypatch.setattr(study_run, "train", lambda recipe, _: trained.append(recipe.output_dir) or train(recipe))
    plan, run = Plan.load(write(family)), tmp_path / "run"
    text = run_study(plan, run).read_text()
    scores = {name: json.loads((run / name / "score.json").read_text()) for name in plan.models}
    assert len({score["data_sha256"] for score in scores.values() if score["stage"] != "autoencoder"}) == 1
    # The whole way to a model counts.
    way = scores["autoencoder"]["training_flops"]
    assert scores["plain"]["total_flops"] == scores["plain"]["training_flops"] + way
    warm = scores["warm"]
    assert warm["total_flops"] == warm["training_flops"] + way + scores["teacher"]["training_flops"]
    assert warm["training_flops"] > scores["plain"]["training_flops"]
    # What token prediction gives in the head's place, where it was trained, of the same text.
    without_head = scores["warm"]["token_prediction"]
    assert without_head["data_sha256"] == scores["plain"]["data_sha256"]
    assert without_head["brier"] != scores["warm"]["brier"]
    assert without_head["inference_flops_per_token"] < scores["warm"]["inference_flops_per_token"]
    assert f" {without_head['brier'][0]:.2f} | " in text
    # Every model beside the first of its table, block by block.
    apart = brier_difference(warm["block_brier"], scores["plain"]["block_brier"])
    assert f"| warm | {brier_cell(warm)} | {difference_cell(apart)} |" in text
    assert "| warm, token prediction | " in text
    assert "### warm, token prediction, T = 0.5" in text
    assert scores["plain"]["token_prediction"] is None
    for part in ("| CALM | ", "| token model | ", "Who wins.", "![Frontier](plot_1.png)", "![Changes](plot_3.png)",
                 "| the documents |", "▸"):  # fmt: skip
        assert part in text
    assert sorted(path.name for path in run.glob("*.png")) == ["plot_1.png", "plot_3.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.glob("*.png"))

    # What is lost is made again, and that alone.
    assert len(trained) == 4
    (run / "plain" / "score.json").unlink()
    trained.clear()
    run_study(plan, run)
    assert trained == [str(run / "plain")]
    # Some models and what they need.
    some = run_study(plan, tmp_path / "some", only=["plain"])
    assert sorted(path.parent.name for path in (tmp_path / "some").glob("*/score.json")) == ["autoencoder", "plain"]
    assert "| CALM | " in some.read_text()
    with pytest.raises(ValueError, match=r"the plan has no model nobody; it has teacher, autoencoder, plain, warm"):
        run_study(plan, run, only=["nobody"])
    # A report of what is there.
    (run / "warm" / "score.json").unlink()
    assert "| warm |" not in write_report(run).read_text()


def test_texts_are_judged_again_where_the_plan_asks_for_others(family, tmp_path, monkeypatch):  # noqa: F811
    judged, judge = [], study_score.evaluate_fluency
    monkeypatch.setattr(
        study_score, "evaluate_fluency", lambda *given, **more: judged.append(more) or judge(*given, **more)
    )
    run, asked = tmp_path / "run", PLAN["fluency"] | {"models": ["teacher"]}

    def texts(**changes):
        path = write(family, fluency=asked | changes, report=[])
        run_study(Plan.load(path), run, only=["teacher"])
        return [each["num_texts"] for each in json.loads((run / "teacher" / "fluency.json").read_text())]

    assert texts() == texts() == [4, 4]
    assert len(judged) == 2  # temperatures, once
    assert texts(num_texts=3, temperatures=[0.5]) == [3]
    assert json.loads((run / "text.json").read_text())["num_texts"] == 3
    assert [each["temperature"] for each in judged] == [1.0, 0.5, 0.5]


def test_what_changed_in_a_plan_is_scored_again_or_refused(family, tmp_path):  # noqa: F811
    run, only = tmp_path / "run", ["plain"]
    run_study(Plan.load(write(family)), run, only=only)
    before = json.loads((run / "plain" / "score.json").read_text())
    # Another protocol: the same models, scored again.
    other = write(family, evaluation=PLAN["evaluation"] | {"num_samples": 4})
    text = run_study(Plan.load(other), run, only=only).read_text()
    after = json.loads((run / "plain" / "score.json").read_text())
    assert (before["num_samples"], after["num_samples"]) == (2, 4)
    assert after["training_flops"] == before["training_flops"]
    assert "with 4 draws" in text
    # Another recipe: not the row of the old one under a new label.
    models = PLAN["models"] | {
        "plain": {"recipe": "calm.yaml", "set": {"model.autoencoder": "@autoencoder", "seed": 7}}
    }
    with pytest.raises(ValueError, match=r"holds a run of another recipe: seed \(0 there, 7 here\)"):
        run_study(Plan.load(write(family, models=models, fluency=None, report=[])), run, only=only)
    assert json.loads((run / "plain" / "score.json").read_text()) == after


def test_what_a_model_was_made_from_counts_once(family, tmp_path):  # noqa: F811
    models = PLAN["models"] | {
        "both": {
            "recipe": "calm.yaml",
            "set": PLAN["models"]["warm"]["set"] | {"model.backbone_weights": "@warm"},
        }
    }
    run = tmp_path / "run"
    run_study(Plan.load(write(family, models=models, fluency=None, report=[])), run, only=["both"])
    scores = {name: json.loads((run / name / "score.json").read_text()) for name in models if name != "plain"}
    assert scores["both"]["total_flops"] == sum(score["training_flops"] for score in scores.values())


def test_rows_scored_differently_are_told_apart(family, tmp_path):  # noqa: F811
    models = {name: PLAN["models"][name] for name in ("teacher", "autoencoder")}
    models["short"] = {"label": "short blocks", "recipe": "baseline.yaml", "set": {"data.block_size": 12}}
    text = run_study(Plan.load(write(family, models=models, fluency=None, report=[])), tmp_path / "run").read_text()
    assert "Not all language models are scored alike" in text
    assert "short blocks: " in text
    assert "token model: " in text


def test_the_commands_print_the_report(family, tmp_path, monkeypatch, capsys):  # noqa: F811
    models = {"teacher": PLAN["models"]["teacher"]}
    path = write(family, models=models, fluency=None, report=[])
    for command in (["study", str(path), "-o", str(tmp_path / "run")], ["report", str(tmp_path / "run")]):
        monkeypatch.setattr(sys, "argv", ["calm", *command])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        assert "| token model | " in capsys.readouterr().out


def test_what_a_study_costs_is_known_before_it_is_trained(family, tmp_path, monkeypatch, capsys):  # noqa: F811
    plan, run = Plan.load(write(family)), tmp_path / "run"
    before = study_cost(plan, run)
    assert not run.exists()
    run_study(plan, run, only=["warm"])
    for name, cost in study_cost(plan, run).items():
        assert cost == before[name] | {"is_done": name != "plain"}
        if cost["is_done"]:
            score = json.loads((run / name / "score.json").read_text())
            assert {key: score[key] for key in cost.keys() - {"is_done"}} == {
                key: value for key, value in cost.items() if key != "is_done"
            }
    command = ["calm", "study", str(family / "plan.yaml"), "-o", str(run), "--cost"]
    for more, said in (([], "Still to train"), (["--tflops", "0"], "--tflops must be above 0, got 0")):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit):
            main()
        assert said in "".join(capsys.readouterr())


def test_several_processes_share_the_work(family, tmp_path):  # noqa: F811
    path = write(family, fluency=None)
    command = [sys.executable, "-m", "calm.cli.main", "study", str(path), "-o", str(tmp_path / "run")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all("| CALM | " in text for text in said)
    for name in PLAN["models"]:
        assert (tmp_path / "run" / name / "score.json").exists()
        steps = [record["step"] for record in read_metrics(tmp_path / "run" / name) if "loss" in record]
        assert len(steps) == len(set(steps))  # by one of them


def test_a_model_another_process_is_at_work_on_is_left_alone(family, tmp_path):  # noqa: F811
    plan = Plan.load(write(family))
    with FileLock(tmp_path / ".teacher.lock"):
        assert not study_run._make("teacher", plan, plan.recipe("teacher", tmp_path), tmp_path, None)
    assert not (tmp_path / "teacher").exists()


def test_the_former_suffix_of_rows_works_with_a_warning(family):  # noqa: F811
    former = {"report": [{"title": "Lines", "lines": {"MTP": ["plain:token_prediction"]}, "rows": ["plain"]}]}
    with pytest.warns(FutureWarning, match=r"the suffix :token_prediction of a plan's rows is :mtp now"):
        plan = Plan.load(write(family, **former))
    assert plan.report[0]["lines"] == {"MTP": ["plain:mtp"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modells": {}}, r"unknown key 'modells' in the plan: did you mean 'models'\?"),
        ({"models": {}}, r"names no models"),
        ({"models": {"calm": {"recipe": "calm.yaml", "set": {"model.autoencoder": "@nobody"}}}}, r"needs @nobody"),
        ({"models": {"calm": {"label": "CALM"}}}, r"model calm of the plan lacks 'recipe'"),
        ({"report": [{"title": "All", "rows": ["somebody"]}]}, r"names 'somebody', which no model is called"),
        (
            {"fluency": {"judge": "teacher:mtp", "models": []}},
            r"names 'teacher:mtp', which no",
        ),
        ({"fluency": {"judge": "teacher", "models": [], "num_texts": "four"}}, r"fluency.num_texts must be a whole"),
        ({"fluency": {"judge": "teacher", "models": [], "temperatures": [0, 1]}}, r"temperatures must lie in \(0, 1\]"),
        ({"models": {"a:b": {"recipe": "calm.yaml"}}}, r"model 'a:b' of the plan: a name must not hold a colon"),
        ({"models": ["calm.yaml"]}, r"models of the plan must be a dict"),
        ({"set": [1]}, r"set of the plan must be a dict"),
        ({"report": [{"rows": ["plain"]}]}, r"a section of the plan's report lacks 'title'"),
        ({"evaluation": {"num_samples": 1}}, r"evaluation.num_samples must be a whole number, at least 2, got 1"),
        ({"evaluation": {"num_blocks": 0}}, r"evaluation.num_blocks must be a whole number, at least 1, got 0"),
        ({"evaluation": {"samples": 3}}, r"unknown key 'samples' in evaluation: did you mean 'num_samples'"),
    ],
)
def test_a_plan_that_does_not_hold_together_is_refused(family, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        Plan.load(write(family, **changes))


def test_a_plan_is_read_as_recipes_are(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("models: {a: {recipe: a.yaml, set: {training.learning_rate: 1e-3}}}")
    assert Plan.load(path).models["a"]["set"] == {"training.learning_rate": 0.001}
    path.write_text("models: [1")
    with pytest.raises(ValueError, match=r"plan\.yaml is not valid YAML"):
        Plan.load(path)


def test_what_could_not_be_scored_is_refused_before_it_is_trained(family, tmp_path):  # noqa: F811
    plan = Plan.load(write(family, evaluation={"stride": 4}))
    with pytest.raises(ValueError, match=r"multiple of the patch size 3 of model autoencoder, got 4"):
        run_study(plan, tmp_path / "run")
    with pytest.raises(ValueError, match=r"model teacher: its recipe needs data.validation"):
        run_study(Plan.load(write(family)), tmp_path / "run", ["data.validation=null"])
    rows = [{"title": "Changes", "rows": ["plain:mtp"]}]
    with pytest.raises(ValueError, match=r"plain has no token prediction: only a CALM has it whose recipe"):
        run_study(Plan.load(write(family, report=rows)), tmp_path / "run")
    with pytest.raises(ValueError, match=r"fluency.judge must be a token model, .*; plain is none"):
        run_study(Plan.load(write(family, fluency={"judge": "plain", "models": ["plain"]})), tmp_path / "run")
    windows = {"model.backbone.model_type": "mistral", "model.backbone.sliding_window": 4,
               "model.backbone.num_key_value_heads": 2}  # fmt: skip
    models = PLAN["models"] | {"teacher": PLAN["models"]["teacher"] | {"set": windows}}
    with pytest.raises(ValueError, match=r"with sliding_window cannot be scored: only full attention \(in a recipe"):
        run_study(Plan.load(write(family, models=models)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_points_of_a_line_say_what_tells_them_apart():
    assert _apart(["CALM, K = 4, S", "CALM, K = 4, M"]) == ["S", "M"]
    assert _apart(["CALM, K = 1", "CALM, K = 2"]) == ["K = 1", "K = 2"]
    assert _apart(["flow", "flower"]) == ["flow", "flower"]
    assert _apart(["CALM, K = 4, M"]) == ["CALM, K = 4, M"]
    assert _apart([]) == []


def test_a_study_is_not_for_torchrun(family, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a study is not for torchrun"):
        run_study(Plan.load(write(family)), tmp_path / "run")


def test_there_is_no_report_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"no study in .*plan\.yaml is missing; `calm study` makes it"):
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["cpu", "english", "gpu"])
def test_the_plans_of_the_examples_hold_together(name, tmp_path):
    plan = Plan.load(f"examples/study/{name}.yaml")
    stages = {model: plan.recipe(model, tmp_path).stage for model in plan.models}
    assert {"autoencoder", "calm"} <= set(stages.values())
    assert plan.recipe("paper-m", tmp_path).model.autoencoder == str(tmp_path / "autoencoder-k4")


def test_a_model_with_token_codes_is_trained_scored_and_judged(family, tmp_path):  # noqa: F811
    coded = {"model.autoencoder": {"type": "codes", "patch_size": 3, "code_size": 8}}
    coded["model.head"] = {"type": "categorical_flow", "num_mlp_layers": 1}
    models = {
        "teacher": {"recipe": "baseline.yaml"},
        "coded": {"label": "coded", "recipe": "calm.yaml", "set": coded},
    }
    fluency = PLAN["fluency"] | {"models": ["coded"]}
    report = [{"title": "Coded", "rows": ["coded", "teacher"]}]
    plan = Plan.load(write(family, models=models, fluency=fluency, report=report))
    text = run_study(plan, tmp_path / "run").read_text()
    score = json.loads((tmp_path / "run" / "coded" / "score.json").read_text())
    assert score["token_accuracy_sample"] == 1
    assert score["total_flops"] == score["training_flops"]  # there is no autoencoder on the way to it
    assert "| coded |" in text
    judged = json.loads((tmp_path / "run" / "coded" / "fluency.json").read_text())
    assert [result["temperature"] for result in judged] == [1.0, 0.5]
