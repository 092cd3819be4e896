"""A study: the models of one plan trained in order, scored on the same text, and compared: `calm study`.

```yaml
evaluation: {stride: 8, num_blocks: 500, num_samples: 8, seed: 0}   # of all language models; blocks default to all
set: {data.train: data/train, data.validation: data/validation}    # for every recipe
models:
  autoencoder: {recipe: autoencoder.yaml}                           # beside the plan
  calm:
    label: CALM, K = 4                                              # in tables; default the name
    recipe: calm.yaml
    set: {model.autoencoder: "@autoencoder"}                        # "@name": where another model of the plan lies
fluency: {judge: baseline, models: [calm], temperatures: [1, 0.5]}  # texts at low temperature; optional
report:                                                             # tables with plots: lines against compute, rows
  - title: Frontier
    text: What is to be seen.
    lines: {CALM: [calm], without its head: ["calm:token_prediction"]}  # what token prediction draws; in fluency too
  - title: Everything
    rows: [autoencoder, calm]
```

A model that is trained and scored (``score.json``) as the plan says is not done again; with another ``evaluation`` it
is scored again, with another ``fluency`` texts are judged again; where a recipe changed the study says so and stops.
Several processes may work on one study: each takes the next model that can be made and that nobody else works on.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.progress import Progress

from calm.data.blocks import TokenBlocks
from calm.data.tokenizer import load_tokenizer
from calm.evaluation.brier_lm import evaluate_brier
from calm.evaluation.compute import compute
from calm.evaluation.fluency import evaluate_fluency, fluency_of_text
from calm.evaluation.reconstruction import evaluate_reconstruction
from calm.files import write_whole
from calm.functional.brier import NGRAM
from calm.models.loading import load_language_model, load_model
from calm.report.study import PLAN, SCORE, WITHOUT_HEAD, fluency_path, write_report
from calm.training.arguments import training_arguments
from calm.training.cost import recipe_cost
from calm.training.models import outline_model
from calm.training.recipe import Recipe, read_yaml
from calm.training.recipe_checks import check_keys
from calm.training.resume import is_complete, read_run
from calm.training.run import train

_PATIENCE = 2.0  # seconds between looks at what other processes have done


@dataclass
class Evaluation:
    """How language models are scored: :func:`~calm.evaluation.brier_lm.evaluate_brier`."""

    stride: int = 8
    num_blocks: int | None = None
    num_samples: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, smallest in (("stride", 1), ("num_blocks", 1), ("num_samples", 2)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < smallest):
                raise ValueError(f"evaluation.{name} must be a whole number, at least {smallest}, got {value!r}.")


@dataclass
class Fluency:
    """Texts that are judged: :func:`~calm.evaluation.fluency.evaluate_fluency`."""

    judge: str
    models: list[str]
    temperatures: list[float] = field(default_factory=lambda: [1.0, 0.5])
    num_texts: int = 64
    prompt_tokens: int = 32
    new_tokens: int = 64

    def needs(self) -> set[str]:
        """The models that all this takes."""
        return {self.judge, *(name.removesuffix(WITHOUT_HEAD) for name in self.models)}


@dataclass
class Plan:
    """A plan as it was read; ``folder`` is where its recipes lie."""

    folder: Path
    models: dict[str, dict[str, Any]]
    evaluation: Evaluation = field(default_factory=Evaluation)
    set: dict[str, Any] = field(default_factory=dict)
    fluency: Fluency | None = None
    report: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Read and check a plan; ValueError names what is unknown or missing."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no plan at {path}.")
        values = read_yaml(path)
        check_keys(values, {"models", "evaluation", "set", "fluency", "report"}, "the plan")
        if not values.get("models"):
            raise ValueError(f"{path} names no models.")
        shapes: dict[str, type] = {"models": dict, "set": dict, "report": list}
        for part, shape in shapes.items():
            if not isinstance(values.get(part) or shape(), shape):
                raise ValueError(f"{part} of the plan must be a {shape.__name__}, got {values[part]!r}.")
        for section in values.get("report") or []:
            check_keys(section, {"title", "text", "rows", "lines"}, "a section of the report")
            if "title" not in section:
                raise ValueError(f"a section of the plan's report lacks 'title': {section!r}.")
        for part, kind in (("evaluation", Evaluation), ("fluency", Fluency)):
            if values.get(part) is not None:
                check_keys(values[part], {each.name for each in dataclasses.fields(kind)}, part)
                values[part] = kind(**values[part])
        plan = cls(folder=path.parent, **values)
        plan._check_names()
        return plan

    def recipe(self, name: str, run: Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe of a model, with its place in the run directory."""
        model = self.models[name]
        settings = self.set | model.get("set", {}) | {"output_dir": str(run / name)}
        settings = {key: str(run / value[1:]) if _is_reference(value) else value for key, value in settings.items()}
        # JSON is YAML: what was a text stays one.
        given = [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *overrides]
        return Recipe.load(self.folder / model["recipe"], given)

    def recipes(self, run: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> dict[str, Recipe]:
        """The recipes of some models (default all) and of what they are made from, in the plan's order."""
        return {name: self.recipe(name, run, overrides) for name in self.with_needs(only or list(self.models))}

    def needs(self, name: str) -> list[str]:
        """The models that a model was made from, directly."""
        return [value[1:] for value in self.models[name].get("set", {}).values() if _is_reference(value)]

    def with_needs(self, names: Sequence[str]) -> list[str]:
        """Models and all they are made from, in the plan's order."""
        wanted = set(names)
        if wanted - self.models.keys():
            unknown = ", ".join(sorted(wanted - self.models.keys()))
            raise ValueError(f"the plan has no model {unknown}; it has {', '.join(self.models)}.")
        for name in reversed(self.models):  # a model needs only those before it
            wanted |= set(self.needs(name)) if name in wanted else set()
        return [name for name in self.models if name in wanted]

    def named(self) -> list[str]:
        """What the report and the judged texts name."""
        judged = [] if self.fluency is None else self.fluency.models
        return [name for section in self.report for name in _named(section)] + judged

    def _check_names(self) -> None:
        known: set[str] = set()
        for name, model in self.models.items():
            check_keys(model, {"label", "recipe", "set"}, f"model {name}")
            if "recipe" not in model:
                raise ValueError(f"model {name} of the plan lacks 'recipe'.")
            for other in self.needs(name):
                if other not in known:
                    raise ValueError(f"model {name} of the plan needs @{other}, which no model before it is called.")
            known.add(name)
        if colon := next((name for name in known if ":" in name), None):
            raise ValueError(f"model {colon!r} of the plan: a name must not hold a colon.")
        judge = [] if self.fluency is None else [self.fluency.judge]
        for name in [*judge, *(name.removesuffix(WITHOUT_HEAD) for name in self.named())]:
            if name not in known:
                raise ValueError(f"the plan's report or fluency names {name!r}, which no model is called.")


def run_study(
    plan: Plan,
    run: str | os.PathLike,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Train and score what is missing, and write the report; returns its path.

    Called by several processes at once, it divides the models between them.

    Args:
        overrides: ``dotted.key=value`` for all recipes.
        only: these models and what they are made from; default all.
    """
    run = Path(run)
    # All at once: a mistake shows before the first run.
    recipes = plan.recipes(run, overrides, only)
    _check_can_be_scored(plan, recipes)
    run.mkdir(parents=True, exist_ok=True)
    task = None if progress is None else progress.add_task("study", total=len(recipes), note="")
    missing = list(recipes)
    while missing := [name for name in missing if not _is_done(plan, recipes[name])]:
        if progress is not None and task is not None:
            progress.update(task, completed=len(recipes) - len(missing))
        ready = (name for name in missing if not set(plan.needs(name)) & set(missing))
        if not any(_make(name, plan, recipes[name], run, progress) for name in ready):
            time.sleep(_PATIENCE)  # other processes are at work on all that could be done
    if progress is not None and task is not None:
        progress.update(task, completed=len(recipes))
    write_whole(run / PLAN, yaml.safe_dump({"models": plan.models, "report": plan.report}, sort_keys=False))
    if plan.fluency is not None and plan.fluency.needs() <= recipes.keys():
        with _lock(run, "fluency"):
            _judge_texts(plan.fluency, run, recipes[plan.fluency.judge], plan.evaluation.seed)
    return write_report(run)


def study_cost(
    plan: Plan, run: str | os.PathLike, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """What the models of a study cost, by name, counted from their shapes: nothing is trained, only data are needed.

    Each has ``is_done`` and what :func:`~calm.training.cost.recipe_cost` says of it alone.
    """
    run = Path(run)
    recipes = plan.recipes(run, overrides, only)
    others = list(recipes.values())
    costs = {}
    for name, recipe in recipes.items():
        steps = recipe.training.get("max_steps")
        if steps is None:
            raise ValueError(f"model {name}: what it costs is known for recipes with training.max_steps.")
        is_done = _is_done(plan, recipe)
        costs[name] = {"is_done": is_done} | recipe_cost(recipe, outline_model(recipe, others), steps, others)
    return costs


def _lock(run: Path, name: str) -> FileLock:
    return FileLock(run / f".{name}.lock")


def _is_done(plan: Plan, recipe: Recipe) -> bool:
    """Whether a model is trained as its recipe says and scored as the plan says."""
    path = Path(recipe.output_dir) / SCORE
    if not path.exists() or not is_complete(recipe):
        return False
    score = json.loads(path.read_text())
    is_whole = recipe.stage != "calm" or "token_prediction" in score
    return is_whole and score.get("evaluation") == asdict(plan.evaluation)


def _check_can_be_scored(plan: Plan, recipes: dict[str, Recipe]) -> None:
    others, stride, named = list(recipes.values()), plan.evaluation.stride, plan.named()
    for name, recipe in recipes.items():
        scored_block_size(name, recipe, stride)
        config: Any = outline_model(recipe, others).config if recipe.stage == "calm" else None
        if config is not None and stride % config.patch_size:
            raise ValueError(
                f"evaluation.stride must be a multiple of the patch size {config.patch_size} of model {name}, got "
                f"{stride}."
            )
        if name + WITHOUT_HEAD in named and not getattr(config, "token_prediction_weight", 0):
            raise ValueError(
                f"the plan's report or fluency names {name + WITHOUT_HEAD}, and {name} has no token prediction: only a "
                "CALM has it whose recipe gives it a model.token_prediction_weight."
            )


def scored_block_size(name: str, recipe: Recipe, stride: int) -> int:
    """Tokens of the blocks that a recipe's model is scored on; ValueError when it cannot be scored."""
    if recipe.data.validation is None:
        raise ValueError(f"model {name}: its recipe needs data.validation, prepared data to be scored on.")
    block_size = recipe.data.block_size // stride * stride
    smallest = stride if recipe.stage == "autoencoder" else -(-NGRAM // stride) * stride + stride
    if block_size < smallest:
        raise ValueError(
            f"model {name}: its data.block_size of {recipe.data.block_size} holds nothing to score at a stride of "
            f"{stride} tokens; it must be at least {smallest}."
        )
    return block_size


def _make(name: str, plan: Plan, recipe: Recipe, run: Path, progress: Progress | None) -> bool:
    """Train and score one model; False when another process is doing that."""
    try:
        with _lock(run, name).acquire(blocking=False):
            if _is_done(plan, recipe):
                return True
            train(recipe, progress)
            score = score_run(run / name, plan.evaluation)
            score["evaluation"] = asdict(plan.evaluation)
            # Each of what it was made from once, however many ways lead there.
            before = [other for other in plan.with_needs([name]) if other != name]
            needed = sum(json.loads((run / other / SCORE).read_text())["training_flops"] for other in before)
            score["total_flops"] = score["training_flops"] + needed
            write_whole(run / name / SCORE, json.dumps(score, indent=1))
    except Timeout:
        return False
    return True


def score_run(path: Path, evaluation: Evaluation) -> dict[str, Any]:
    """What a trained model of a recipe cost and how good it is.

    An autoencoder: how much text comes back. A language model: BrierLM, the same of its autoencoder, and BrierLM of its
    token prediction, without the head.
    """
    recipe, steps = read_run(path)
    assert recipe is not None
    model: Any = load_model(path)
    model.to(training_arguments(recipe).device)  # where it was trained
    patch_size = getattr(model.config, "patch_size", None)
    block_size = scored_block_size(path.name, recipe, evaluation.stride)
    blocks = TokenBlocks(str(recipe.data.validation), block_size, evaluation.stride)
    assert steps is not None
    score = {"stage": recipe.stage, "patch_size": patch_size} | recipe_cost(recipe, model, steps)
    if recipe.stage == "autoencoder":
        return score | evaluate_reconstruction(model, blocks, evaluation.num_blocks).to_dict()
    scored = partial(
        evaluate_brier, model, blocks, evaluation.stride, evaluation.num_blocks, evaluation.num_samples,
        seed=evaluation.seed,
    )  # fmt: skip
    score |= scored().to_dict()
    if recipe.stage == "calm":
        rebuilt = evaluate_reconstruction(model.autoencoder, blocks, evaluation.num_blocks)
        score["token_accuracy_sample"] = rebuilt.token_accuracy_sample
        score["token_prediction"] = None
        if model.config.token_prediction_weight:
            positions = recipe.data.block_size // model.config.patch_size
            cost = compute(model, positions, sampler="token_prediction").inference_flops_per_token["total"]
            without_head = scored(sampler="token_prediction").to_dict()
            score["token_prediction"] = without_head | {"inference_flops_per_token": cost}
    return score


def _judge_texts(fluency: Fluency, run: Path, judge_recipe: Recipe, seed: int) -> None:
    """Put ``fluency.json`` into the directory of every model, and of the text itself into that of the judge."""
    assert judge_recipe.data.validation is not None
    device: Any = training_arguments(judge_recipe).device
    judge: Any = load_language_model(run / fluency.judge)
    judge.to(device)
    tokenizer = load_tokenizer(run / fluency.judge)
    blocks = TokenBlocks(judge_recipe.data.validation, judge_recipe.data.block_size)
    size = (fluency.num_texts, fluency.prompt_tokens, fluency.new_tokens)
    asked = {key: value for key, value in asdict(fluency).items() if key != "models"} | {"seed": seed}
    path = run / "text.json"
    if not (path.exists() and _is_judged([json.loads(path.read_text())], asked)):
        text = fluency_of_text(judge, tokenizer, blocks, *size).to_dict()
        write_whole(path, json.dumps(text | {"asked": asked}, indent=1))
    for name in fluency.models:
        path = fluency_path(run, name)
        if not (path.exists() and _is_judged(json.loads(path.read_text()), asked)):
            model: Any = load_language_model(path.parent)
            model.to(device)
            sampler = "token_prediction" if name.endswith(WITHOUT_HEAD) else None
            judged = partial(evaluate_fluency, model, judge, tokenizer, blocks, *size, seed=seed, sampler=sampler)
            results = [judged(temperature=temperature).to_dict() for temperature in fluency.temperatures]
            write_whole(path, json.dumps([result | {"asked": asked} for result in results], indent=1))


def _is_judged(results: list[dict[str, Any]], asked: dict[str, Any]) -> bool:
    """Whether texts were judged as the plan says now."""
    return all(result.get("asked") == asked for result in results)


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("@")


def _named(section: dict[str, Any]) -> list[str]:
    return [*section.get("rows", []), *(name for line in section.get("lines", {}).values() for name in line)]
