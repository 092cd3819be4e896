"""The whole path on a small corpus, in a given time: `calm quickstart` and `make demo`.

Every stage leaves its result in the run directory. A stage that is complete is not repeated, so a run that was killed
resumes when it is started again with the same arguments. How many steps the models train follows from the clock
(:mod:`calm.workflows.quickstart_plan`).
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID
from transformers import PreTrainedModel

from calm.checkpoints.loading import load_model
from calm.data.blocks import TokenBlocks
from calm.data.corpus import write_embedded_corpus
from calm.data.documents import read_documents
from calm.data.prepare import prepare
from calm.data.tokenizer import load_tokenizer, train_tokenizer
from calm.models.context import patch_size_of
from calm.training.recipe.cost import recipe_cost
from calm.training.recipe.recipe import Recipe
from calm.training.run import train
from calm.training.speed import seconds_per_step
from calm.training.state.resume import read_run
from calm.utils.files import only_writer, staged_directory, write_json, write_whole
from calm.utils.progress import ProgressCallback, duration
from calm.workflows import quickstart_plan as planning
from calm.workflows.quickstart_plan import Round
from calm.workflows.quickstart_results import (
    NGRAM_ROWS,
    ROWS,
    SAMPLE_TEMPERATURE,
    first_line,
    generation_speed,
    round_trip,
    sample_rows,
    score_rows,
    seconds_per_block,
)

QUICKSTART = "quickstart.json"  # the settings of a run directory
VOCAB_SIZE = 1024
# The models in the order of their training, with their recipes and labels.
MODELS = {"calm": "calm.yaml", "baseline": "baseline.yaml"}
LABELS = {"calm": "CALM", "baseline": "baseline"}
EVALUATION_BLOCKS = 240


def run_quickstart(
    run: Path,
    minutes: float,
    seed: int,
    device: str,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
) -> dict:
    """Carry out or resume the quickstart in ``run`` and return the results, which are also in ``results.json``.

    Args:
        run: directory of the quickstart.
        minutes: time budget of the whole path.
        seed: seed of initialisation, data order and sampling.
        device: name of the device that trains.
        progress: display of the stages.
        clock: returns the present time in seconds.
        started: time at which the command began to load its libraries; default: now.

    Raises:
        ValueError: the budget is too short for this machine, or the directory has another content.
    """
    with only_writer(run):
        quickstart = _Quickstart(run, minutes, seed, device, progress, clock)
        return quickstart.carry_out(clock() if started is None else started)


class _Quickstart:
    """One run directory: the stages, and the seconds that each has taken so far (``plan.json``)."""

    def __init__(
        self, run: Path, minutes: float, seed: int, device: str, progress: Progress, clock: Callable[[], float]
    ):
        self.run, self.seed, self.device, self.progress, self.clock = run, seed, device, progress, clock
        self.settings = {"minutes": minutes, "seed": seed}
        self.budget = 60 * minutes
        self.plan: dict[str, Any] = {"seconds_per_step": {}, "seconds": {}, "rounds": [], "num_blocks": None}
        self.overall = TaskID(0)
        self.tasks: dict[str, TaskID] = {}

    def carry_out(self, started: float) -> dict:
        results_path = self.run / "results.json"
        self._open(started)
        # The seconds of the budget are its steps.
        self.overall = self.progress.add_task("quickstart", total=round(self.budget), note="")

        def stage(name: str, target: Path, work: Callable[[], object]) -> None:
            self._show(name)
            if not target.exists():
                self._announce(name, planning.seconds_for([name], self._step_seconds))
                with self._timed(name):
                    work()

        corpus, tokenizer, data = self.run / "corpus", self.run / "tokenizer", self.run / "data"
        stage("corpus", corpus / "validation.jsonl", lambda: write_embedded_corpus(corpus))
        stage("tokenizer", tokenizer, lambda: _train_tokenizer(corpus / "train.jsonl", tokenizer))
        stage("token files", data / "train" / "manifest.json", lambda: _prepare(corpus, tokenizer, data, self.seed))
        self._train()
        self._show("scores, speed and samples")
        if not results_path.exists():
            results = self.settings | self._evaluate()
            write_json(results_path, results | {"stages": self._stages(results["training"])})
        self.progress.update(self.overall, completed=round(self.budget), note="done")
        return json.loads(results_path.read_text(encoding="utf-8"))

    def _open(self, started: float) -> None:
        """Read the plan of the run directory or begin one; ValueError where that is not possible."""
        plan_path = self.run / "plan.json"
        _check_settings(self.run, self.settings)
        if plan_path.exists():
            plan = json.loads(plan_path.read_text(encoding="utf-8"))
            if plan.keys() != self.plan.keys():
                raise ValueError(f"{self.run} was begun by another release: choose another directory, or remove it.")
            self.plan = plan
            return
        for name in MODELS:
            recipe = self._recipe(name, vocab_size=VOCAB_SIZE)
            self.plan["seconds_per_step"][name] = seconds_per_step(recipe, self.clock)
        planning.check_budget(self.budget, self._step_seconds)
        self.run.mkdir(parents=True, exist_ok=True)
        write_whole(self.run / QUICKSTART, json.dumps(self.settings))
        self._record("start", self.clock() - started)

    @property
    def _step_seconds(self) -> float:
        """Seconds of one step of all models together, as measured last."""
        return sum(self.plan["seconds_per_step"].values())

    @property
    def _elapsed(self) -> float:
        """Seconds of all complete stages and rounds, those before a kill included."""
        rounds = [seconds for planned in self.plan["rounds"] for seconds in planned["seconds"].values()]
        return sum(self.plan["seconds"].values()) + sum(rounds)

    def _record(self, stage: str, seconds: float) -> None:
        self.plan["seconds"][stage] = self.plan["seconds"].get(stage, 0.0) + seconds
        write_json(self.run / "plan.json", self.plan)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = self.clock()
        yield
        self._record(stage, self.clock() - started)

    def _show(self, note: str) -> None:
        self.progress.update(self.overall, completed=round(min(self._elapsed, 0.99 * self.budget)), note=note)

    def _announce(self, stage: str, seconds: float) -> None:
        self.progress.console.out(f"{stage}: about {duration(seconds)}", highlight=False)

    def _train(self) -> None:
        """Train the models in rounds of equally many steps until the time for training is used up."""
        entries = self.plan["rounds"]
        while True:
            if not entries or len(entries[-1]["seconds"]) == len(MODELS):
                left = self.budget - self._elapsed
                left -= planning.seconds_after_training(self.budget, self._step_seconds)
                rounds = [_round(entry) for entry in entries]
                following = planning.next_round(rounds, left, self._step_seconds)
                if following is None:
                    return
                if not entries:
                    self._announce(
                        f"train CALM and baseline, {following.planned_steps} steps each",
                        following.planned_steps * self._step_seconds,
                    )
                entries.append(following.to_dict() | {"seconds": {}})
                write_json(self.run / "plan.json", self.plan)
            self._show("train CALM and baseline in turns")
            self._train_round(entries[-1])

    def _train_round(self, entry: dict[str, Any]) -> None:
        planned = _round(entry)
        for name in MODELS:
            if name in entry["seconds"]:
                continue
            callback = ProgressCallback(
                self.progress, f"train {LABELS[name]}", total=planned.planned_steps, task=self.tasks.get(name)
            )
            started = self.clock()
            recipe = self._recipe(name, planned)
            train(recipe, self.progress, allow_recipe_change=True, progress_callback=callback)
            entry["seconds"][name] = self.clock() - started
            # After a kill, the round may be complete already.
            if callback.begun:
                assert callback.task is not None
                self.tasks[name] = callback.task
                if steps := planned.end - callback.first_step:
                    self.plan["seconds_per_step"][name] = entry["seconds"][name] / steps
            write_json(self.run / "plan.json", self.plan)

    def _recipe(self, name: str, planned: Round | None = None, vocab_size: int | None = None) -> Recipe:
        """Return the recipe of a model with its place in the run directory and the steps of a round."""
        paths = {
            "output_dir": self.run / name,
            "data.train": self.run / "data" / "train",
            "data.validation": self.run / "data" / "validation",
        }
        values: dict[str, Any] = {key: str(path) for key, path in paths.items()} | {"seed": self.seed}
        if vocab_size is not None:
            values["model.backbone.vocab_size"] = vocab_size
        if self.device == "cpu":
            values["training.use_cpu"] = True
        if planned is not None:
            values |= {
                "training.max_steps": planned.end,
                "training.save_steps": max(planning.MIN_ROUND_STEPS, (planned.end - planned.start) // 2),
                "training.warmup_steps": planning.WARMUP_STEPS,
                "training.lr_scheduler_type": "warmup_stable_decay",
                "training.lr_scheduler_kwargs": planned.schedule(),
            }
        # As JSON, because a path may be something else to YAML.
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        with resources.as_file(resources.files("calm") / "recipes" / "quickstart" / MODELS[name]) as recipe_path:
            return Recipe.load(recipe_path, overrides)

    def _stages(self, training: dict[str, dict]) -> list[dict]:
        """Return stage, steps and tokens (where it has them) and seconds of every stage."""
        rows: list[dict] = []
        for stage, seconds in self.plan["seconds"].items():
            if stage == planning.AFTER_TRAINING[0]:
                rows += [
                    {
                        "stage": f"train {LABELS[name]}",
                        "steps": self.plan["rounds"][-1]["end"],
                        "tokens": training[LABELS[name]]["tokens"],
                        "seconds": sum(entry["seconds"][name] for entry in self.plan["rounds"]),
                    }
                    for name in MODELS
                ]
            rows.append({"stage": stage, "steps": None, "tokens": None, "seconds": seconds})
        return rows

    def _evaluate(self) -> dict:
        block_size = Recipe.load(self.run / "calm" / "recipe.yaml").data.block_size
        models: dict[str, Any] = {name: load_model(self.run / name) for name in MODELS}
        for model in models.values():
            model.to(self.device)
        stride = models["calm"].config.patch_size
        data = self.run / "data"
        train_blocks = TokenBlocks(data / "train", block_size, stride)
        blocks = TokenBlocks(data / "validation", block_size, stride)
        scores_stage, samples_stage = planning.AFTER_TRAINING
        step_seconds = self._step_seconds
        left = self.budget - self._elapsed - planning.seconds_for([samples_stage], step_seconds)
        usual = planning.seconds_for([scores_stage], step_seconds)
        self._announce(scores_stage, min(max(left, planning.MIN_SCORES_SHARE * usual), usual))
        with self._timed(scores_stage):
            if self.plan["num_blocks"] is None:
                per_block = seconds_per_block(models, blocks, self.clock)
                most = min(EVALUATION_BLOCKS, len(blocks))
                self.plan["num_blocks"] = planning.blocks_to_score(left, per_block, most)
                write_json(self.run / "plan.json", self.plan)
            brier = score_rows(models, train_blocks, blocks, self.plan["num_blocks"], self.seed, self.progress)
        self._announce(samples_stage, planning.seconds_for([samples_stage], step_seconds))
        with self._timed(samples_stage):
            tokenizer = load_tokenizer(self.run / "tokenizer")
            speeds = {row: generation_speed(models[name], blocks, sampler) for row, (name, sampler, _) in ROWS.items()}
            samples = sample_rows(models, tokenizer, self.seed)
            trip = round_trip(models["calm"], tokenizer, first_line(self.run / "corpus" / "validation.jsonl"))
        costs = {name: _training_cost(self.run / name, model) for name, model in models.items()}
        return {
            "patch_size": stride,
            "brier": brier,
            "steps_per_token": {row: 1 / patch_size_of(models[name].config) for row, (name, _, _) in ROWS.items()}
            | dict.fromkeys(NGRAM_ROWS, 0),
            "training": {row: costs[name] for row, (name, _, _) in ROWS.items()},
            "generation_tokens_per_second": speeds,
            "samples": samples,
            "round_trip": trip,
        }


def _round(entry: dict[str, Any]) -> Round:
    return Round(**{name: value for name, value in entry.items() if name != "seconds"})


def _check_settings(run: Path, settings: dict) -> None:
    """Raise ValueError if a run directory holds something else than a quickstart with these settings."""
    path = run / QUICKSTART
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != settings:
            raise ValueError(
                f"{run} holds a quickstart with {before}, not {settings}: choose another directory, or remove this one."
            )
        return
    # A run that was killed while it wrote its settings leaves a part of them.
    if run.exists() and any(not path.name.startswith(f".{QUICKSTART}.") for path in run.iterdir()):
        raise ValueError(f"{run} is not empty and holds no quickstart: choose another directory.")


def _train_tokenizer(corpus: Path, output: Path) -> None:
    with staged_directory(output) as staging:
        train_tokenizer(read_documents([str(corpus)]), VOCAB_SIZE).save_pretrained(staging)


def _prepare(corpus: Path, tokenizer_path: Path, data: Path, seed: int) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    for split in ("validation", "train"):
        prepare([corpus / f"{split}.jsonl"], tokenizer, data / split, seed=seed)


def _training_cost(run: Path, model: PreTrainedModel) -> dict:
    recipe, steps = read_run(run)
    assert recipe is not None
    assert steps is not None
    return recipe_cost(recipe, model, steps)


def next_command(run: Path) -> str:
    """Return a shell command that continues a prompt with the trained CALM, with full paths."""
    program = Path(sys.executable).with_name("calm")
    parts = [str(program)] if program.is_file() else [sys.executable, "-m", "calm"]
    parts += ["generate", str((run / "calm").absolute()), "--prompt", "def ", "--sampler", "direct"]
    return shlex.join([*parts, "--temperature", f"{SAMPLE_TEMPERATURE:g}"])
