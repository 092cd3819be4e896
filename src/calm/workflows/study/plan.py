"""The plan of a study, as `calm study` reads it.

```yaml
evaluation: {stride: 8, num_blocks: 500, num_samples: 8, seed: 0}   # of all language models; blocks default to all
set: {data.train: data/train, data.validation: data/validation}    # for every recipe
models:
  autoencoder: {recipe: autoencoder.yaml}                           # beside the plan, or recipes/... of this package
  calm:
    label: CALM, K = 4                                              # in tables; default the name
    recipe: calm.yaml
    set: {model.autoencoder: "@autoencoder"}                        # "@name": where another model of the plan lies
fluency: {judge: baseline, models: [calm], temperatures: [1, 0.5]}  # texts at low temperature; optional
report:                                                             # tables with plots: lines against compute, rows
  - title: Frontier
    text: What is to be seen.
    lines: {CALM: [calm], without its head: ["calm:mtp"]}   # samples of multi-token prediction; in fluency too
  - title: Everything
    rows: [autoencoder, calm]
```
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calm.report.study import FORMER_SUFFIX, WITHOUT_HEAD
from calm.training.recipe.checks import check_keys
from calm.training.recipe.recipe import Recipe, find_recipe, read_yaml


@dataclass
class Evaluation:
    """How language models are scored: :func:`~calm.evaluation.brier_lm.evaluate_brier`."""

    stride: int = 8
    num_blocks: int | None = None
    num_samples: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _check_whole("evaluation.stride", self.stride, 1)
        if self.num_blocks is not None:
            _check_whole("evaluation.num_blocks", self.num_blocks, 1)
        _check_whole("evaluation.num_samples", self.num_samples, 2)


@dataclass
class Fluency:
    """Texts that are judged: :func:`~calm.evaluation.generation_quality.evaluate_fluency`."""

    judge: str
    models: list[str]
    temperatures: list[float] = field(default_factory=lambda: [1.0, 0.5])
    num_texts: int = 64
    prompt_tokens: int = 32
    new_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("num_texts", "prompt_tokens", "new_tokens"):
            _check_whole(f"fluency.{name}", getattr(self, name), 1)
        if not isinstance(self.temperatures, list) or not self.temperatures:
            raise ValueError(f"fluency.temperatures must be a list of numbers in (0, 1], got {self.temperatures!r}.")
        for temperature in self.temperatures:
            if not isinstance(temperature, int | float) or not 0 < temperature <= 1:
                raise ValueError(f"fluency.temperatures must lie in (0, 1], got {temperature!r}.")

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
        """Read and check a plan, found as recipes are; ValueError names what is unknown or missing."""
        path = find_recipe(path, "plan")
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
        _rename_rows(values)
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
        beside = self.folder / model["recipe"]
        return Recipe.load(beside if beside.is_file() else find_recipe(model["recipe"]), given)

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


def _rename_rows(values: dict[str, Any]) -> None:
    """Replace the former suffix ``:token_prediction`` of names in the report and in the judged texts."""

    def renamed(names: Any) -> Any:
        if not isinstance(names, list):
            return names
        if any(isinstance(name, str) and name.endswith(FORMER_SUFFIX) for name in names):
            warnings.warn(
                f"the suffix {FORMER_SUFFIX} of a plan's rows is {WITHOUT_HEAD} now; the old one works for one more "
                "release.",
                FutureWarning,
                stacklevel=4,
            )
        return [name.replace(FORMER_SUFFIX, WITHOUT_HEAD) if isinstance(name, str) else name for name in names]

    for section in values.get("report") or []:
        if "rows" in section:
            section["rows"] = renamed(section["rows"])
        if isinstance(section.get("lines"), dict):
            section["lines"] = {label: renamed(names) for label, names in section["lines"].items()}
    if values.get("fluency") is not None:
        values["fluency"].models = renamed(values["fluency"].models)


def _check_whole(name: str, value: Any, smallest: int) -> None:
    if not isinstance(value, int) or value < smallest:
        raise ValueError(f"{name} must be a whole number, at least {smallest}, got {value!r}.")


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("@")


def _named(section: dict[str, Any]) -> list[str]:
    return [*section.get("rows", []), *(name for line in section.get("lines", {}).values() for name in line)]
