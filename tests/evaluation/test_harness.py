"""The lm-evaluation-harness itself, on a task of our own and a real tiny model."""

import json
import sys
from dataclasses import replace

import lm_eval
import pytest
import tiny
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from calm.cli.main import main
from calm.data.tokenizer import train_tokenizer
from calm.evaluation.harness import CalmHarness
from calm.evaluation.likelihood import log_likelihoods
from calm.generation.completions import complete

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("harness") / "model"
    tokenizer = train_tokenizer(["one two three four five six seven"] * 9, 270)
    calm = tiny.calm(2, vocab_size=len(tokenizer), token_prediction="autoregressive")
    calm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tasks(tmp_path):
    """A generative and a log-likelihood task on a local file."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": q}) + "\n" for q in ("one two", "three", "four") * 3))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}} ",
        "doc_to_target": "{{answer}}",
    }
    generative = common | {
        "task": "repeat",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    }
    likelihood = common | {"task": "likely", "output_type": "loglikelihood", "metric_list": [{"metric": "perplexity"}]}
    return generative, likelihood


def evaluate(harness, task):
    manager = TaskManager(include_defaults=False)  # reading lm-eval's thousands of tasks takes longer than ours
    return lm_eval.simple_evaluate(model=harness, tasks=[task], task_manager=manager, bootstrap_iters=0)


def test_generative_tasks_are_scored(model, tasks):
    harness = CalmHarness(str(model), temperature=0.5, num_candidates=20, batch_size=4)
    result = evaluate(harness, tasks[0])
    answers = [sample["resps"][0][0] for sample in result["samples"]["repeat"]]
    assert len(answers) == 9
    assert all("\n" not in answer and "." not in answer for answer in answers)
    assert len({*answers}) > 1
    assert 0 <= result["results"]["repeat"]["exact_match,none"] <= 1
    again = evaluate(harness, tasks[0])
    assert answers == [sample["resps"][0][0] for sample in again["samples"]["repeat"]]


def test_likelihood_tasks_are_refused_with_the_reason(model, tasks):
    with pytest.raises(ValueError, match=r"gives samples, not token probabilities.*generate_until"):
        evaluate(CalmHarness(str(model), sampler="batch"), tasks[1])


def test_likelihood_tasks_are_scored_by_token_prediction(model, tasks):
    harness = CalmHarness(str(model), sampler="mtp", batch_size=2)
    result = evaluate(harness, tasks[1])
    ids = harness.tok_encode
    for sample in result["samples"]["likely"]:
        (((found, likeliest),),) = sample["resps"]
        question = sample["doc"]["question"]
        text = ids(f"{question} {question}")
        split = len(ids(question))  # the space belongs to what follows
        assert (found, likeliest) == (
            pytest.approx(log_likelihoods(harness.model, [text[:split]], [text[split:]])[0][0], rel=1e-4),
            False,
        )
    # A whole text, in windows of the context: behind one token, the last behind what fills its window.
    text = "one two three four " * 40
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (whole,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    tokens, window = ids(text), harness._room(1)
    assert len(tokens) > 2 * window
    pieces = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    before = [[harness.eot_token_id], *([piece[-1]] for piece in pieces[:-2])]
    before.append(tokens[len(tokens) - window - 1 : -len(pieces[-1])])
    assert whole == pytest.approx(sum(value for value, _ in log_likelihoods(harness.model, before, pieces)), rel=1e-4)
    # A context that is too long keeps its end.
    long, short = ([Instance("loglikelihood", {}, (f"{'two ' * times}one", " three"), 0)] for times in (400, 300))
    assert harness.loglikelihood(long, True)[0][0] == pytest.approx(harness.loglikelihood(short, True)[0][0])


def test_unknown_arguments_are_refused(model):
    with pytest.raises(ValueError, match=r"unknown in model_args: temprature; allowed: pretrained, .*dtype"):
        CalmHarness.create_from_arg_string(f"pretrained={model},temprature=0.5", {"max_batch_size": None})


def test_a_missing_model_is_named():
    with pytest.raises(ValueError, match=r"model_args names no model: .* --model_args pretrained=runs/calm"):
        CalmHarness.create_from_arg_string("temperature=0.5", {"max_batch_size": None})


def test_a_missing_model_ends_the_command_in_one_line(tasks, tmp_path, monkeypatch, capsys):
    import yaml

    (tmp_path / "repeat.yaml").write_text(yaml.safe_dump(tasks[0]))
    arguments = ["run", "--model", "calm", "--tasks", "repeat", "--include_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["calm", "harness", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("calm: model_args names no model")


def test_long_prompts_keep_their_end(model):
    harness = CalmHarness(str(model))
    room = harness._room(8)
    assert room == (64 - 4 + 1) * 2  # the last chunk is not fed back
    for prompt in ("one two " * 200 + "seven", "a" + "€" * 200):  # characters of several tokens may be cut in two
        request = Instance("generate_until", {}, (prompt, {"max_gen_toks": 8}), 0)
        end = harness.tok_encode(prompt)[-room:]
        alone = complete(harness.model, harness.tokenizer, [end], replace(harness.settings, max_new_tokens=8))
        assert harness.generate_until([request], disable_tqdm=True) == [alone[0]["text"]]
    with pytest.raises(ValueError, match="max_gen_toks=500 leaves no room"):
        harness._room(500)


def test_the_command_line_is_lm_evals(model, tasks, tmp_path, monkeypatch, capsys):
    import yaml

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "repeat.yaml").write_text(yaml.safe_dump(tasks[0]))
    arguments = ["--model", "calm", "--model_args", f"pretrained={model},num_candidates=10", "--tasks", "repeat"]
    arguments += ["--include_path", str(tmp_path / "tasks"), "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["calm", "harness", "run", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    table = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    headings = next(row for row in table if "Tasks" in row)
    assert "exact_match" in next(row for row in table if "repeat" in row)[headings.index("Metric")]
