"""The whole path on a small corpus, in a given time: `calm quickstart` and `make demo`.

Every stage leaves its result in the run directory. What is there already is not done again, so that a run that was
killed goes on where it was when it is started again with the same arguments.
"""

import json
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.checkpoints.loading import load_model
from calm.data.blocks import TokenBlocks
from calm.data.corpus import write_embedded_corpus
from calm.data.documents import read_documents
from calm.data.prepare import prepare
from calm.data.text import decode_continuation, encode_plain_text
from calm.data.tokenizer import load_tokenizer, train_tokenizer
from calm.evaluation.brier_lm import evaluate_brier
from calm.evaluation.ngram_baselines import evaluate_counts
from calm.generation.completions import continue_tokens
from calm.generation.sampling_params import SamplingParams
from calm.models.modeling_calm import CalmForCausalLM
from calm.training.recipe.cost import recipe_cost
from calm.training.recipe.recipe import Recipe
from calm.training.run import train
from calm.training.speed import seconds_per_step
from calm.training.state.resume import is_complete, read_run
from calm.utils.files import only_writer, staged_directory, write_json, write_whole

QUICKSTART = "quickstart.json"  # the settings of a run directory
VOCAB_SIZE = 1024
# The models in the order of their training. They get the same steps on the same blocks, as many as fit into this share
# of the time budget; the rest is for the corpus, the evaluation and the samples.
MODELS = {"calm": "calm.yaml", "baseline": "baseline.yaml"}
TRAINING_SHARE = 0.8
FEWEST_STEPS = 20
# The scored rows: a model, and its sampler.
ROWS = {
    "calm": ("calm", "batch"),
    "calm (mtp)": ("calm", "mtp"),
    "baseline": ("baseline", None),
}
EVALUATION_BLOCKS = 240
EVALUATION_SAMPLES = 8
# The models whose continuations stand side by side, with their samplers.
SAMPLED = {
    "CALM": ("calm", "direct"),
    "CALM, mtp": ("calm", "mtp"),
    "baseline": ("baseline", None),
}
SAMPLE_TEMPERATURE = 0.5
SAMPLE_TOKENS = 64
PROMPTS = ("def __init__(self, ", "import os\n", "    for i in range(")
SPEED_TOKENS, SPEED_BATCH = 128, 8


def run_quickstart(run: Path, minutes: float, seed: int, device: str, progress: Progress) -> dict:
    """Carry out, or finish, the quickstart in ``run``; returns the results, which also lie in ``results.json``."""
    with only_writer(run):
        return _run_quickstart(run, minutes, seed, device, progress)


def _run_quickstart(run: Path, minutes: float, seed: int, device: str, progress: Progress) -> dict:
    settings = {"minutes": minutes, "seed": seed}
    _check_settings(run, settings)
    overall = progress.add_task("quickstart", total=4 + len(MODELS), note="")

    def stage(name: str, target: Path, work: Callable[[], object]) -> None:
        progress.update(overall, note=name if not target.exists() else f"{name}: there already")
        if not target.exists():
            work()
        progress.advance(overall)

    corpus, tokenizer_path, data = run / "corpus", run / "tokenizer", run / "data"
    stage("corpus", corpus / "validation.jsonl", lambda: write_embedded_corpus(corpus))
    stage("tokenizer", tokenizer_path, lambda: _train_tokenizer(corpus / "train.jsonl", tokenizer_path))
    stage("prepare", data / "train" / "manifest.json", lambda: _prepare(corpus, tokenizer_path, data, seed))
    steps = _planned_steps(run, 60 * minutes * TRAINING_SHARE, seed, device)
    for name in MODELS:
        recipe = _recipe(run, name, seed, device, steps)
        progress.update(overall, note=f"train {name}")
        if not is_complete(recipe):
            train(recipe, progress)
        progress.advance(overall)
    progress.update(overall, note="evaluation and samples")
    results_path = run / "results.json"
    if not results_path.exists():
        results = settings | _evaluate(run, seed, device, progress)
        write_json(results_path, results)
    progress.update(overall, completed=4 + len(MODELS), note="done")
    return json.loads(results_path.read_text(encoding="utf-8"))


def _check_settings(run: Path, settings: dict) -> None:
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
    run.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings))


def _train_tokenizer(corpus: Path, output: Path) -> None:
    with staged_directory(output) as staging:
        train_tokenizer(read_documents([str(corpus)]), VOCAB_SIZE).save_pretrained(staging)


def _prepare(corpus: Path, tokenizer_path: Path, data: Path, seed: int) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    for split in ("validation", "train"):
        prepare([corpus / f"{split}.jsonl"], tokenizer, data / split, seed=seed)


def _planned_steps(run: Path, seconds: float, seed: int, device: str) -> int:
    """Return the steps that every model takes; decided once and kept, so that a resumed run ends as planned."""
    path = run / "plan.json"
    if not path.exists():
        per_step = {name: seconds_per_step(_recipe(run, name, seed, device)) for name in MODELS}
        steps = max(FEWEST_STEPS, int(seconds / sum(per_step.values())))
        write_whole(path, json.dumps({"seconds_per_step": per_step, "max_steps": steps}))
    return json.loads(path.read_text(encoding="utf-8"))["max_steps"]


def _recipe(run: Path, name: str, seed: int, device: str, steps: int | None = None) -> Recipe:
    """Return the recipe of a model with its place in the run directory."""
    paths = {
        "output_dir": run / name,
        "data.train": run / "data" / "train",
        "data.validation": run / "data" / "validation",
    }
    # Quoted: to YAML, a path may look like something else.
    overrides = [f"seed={seed}", *(f"{key}={json.dumps(str(path))}" for key, path in paths.items())]
    if device == "cpu":
        overrides.append("training.use_cpu=true")
    if steps is not None:
        overrides += [f"training.max_steps={steps}", f"training.save_steps={max(FEWEST_STEPS, steps // 5)}"]
    with resources.as_file(resources.files("calm") / "recipes" / "quickstart" / MODELS[name]) as recipe_path:
        return Recipe.load(recipe_path, overrides)


def _evaluate(run: Path, seed: int, device: str, progress: Progress) -> dict:
    block_size = Recipe.load(run / "calm" / "recipe.yaml").data.block_size
    models: dict[str, Any] = {name: load_model(run / name) for name in MODELS}
    for model in models.values():
        model.to(device)
    stride = models["calm"].config.patch_size
    train_blocks = TokenBlocks(run / "data" / "train", block_size, stride)
    blocks = TokenBlocks(run / "data" / "validation", block_size, stride)

    brier = {}
    for row, (name, sampler) in ROWS.items():
        task = progress.add_task(f"score {row}", total=len(blocks.spread(EVALUATION_BLOCKS)), note="")
        advance = lambda done, task=task: progress.advance(task, done)  # noqa: E731
        scored = evaluate_brier(
            models[name], blocks, stride, num_blocks=EVALUATION_BLOCKS, num_samples=EVALUATION_SAMPLES, seed=seed,
            advance=advance, sampler=sampler or "batch",
        )  # fmt: skip
        brier[row] = scored.to_dict()
    for name, order in (("bigram counts", 2), ("unigram counts", 1)):
        brier[name] = evaluate_counts(train_blocks, blocks, order, stride, EVALUATION_BLOCKS).to_dict()

    tokenizer = load_tokenizer(run / "tokenizer")
    training = {name: _training_cost(run / name, model) for name, model in models.items()}
    return {
        "brier": brier,
        "training": {row: training[name] for row, (name, _) in ROWS.items()},
        "generation_tokens_per_second": {
            row: _generation_speed(models[name], blocks, sampler) for row, (name, sampler) in ROWS.items()
        },
        "samples": _samples(models, tokenizer, seed),
    }


def _training_cost(run: Path, model: PreTrainedModel) -> dict:
    recipe, steps = read_run(run)
    assert recipe is not None
    assert steps is not None
    return recipe_cost(recipe, model, steps)


def _generation_speed(model: Any, blocks: TokenBlocks, sampler: str | None) -> float:
    """Tokens per second at temperature 1, a batch of prompts, the median of three runs."""
    prompts = torch.stack([blocks[index]["input_ids"][:64] for index in range(SPEED_BATCH)]).to(model.device)
    extra = (
        {"sampler": sampler}
        if isinstance(model, CalmForCausalLM)
        else {"do_sample": True, "top_k": 0, "attention_mask": torch.ones_like(prompts)}
    )
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    model.generation_config.eos_token_id = None  # every row runs to the end
    model.generation_config.pad_token_id = 0
    rates = []
    for _ in range(4):
        started = time.perf_counter()
        model.generate(prompts, max_new_tokens=SPEED_TOKENS, temperature=1.0, **extra)
        rates.append(SPEED_BATCH * SPEED_TOKENS / (time.perf_counter() - started))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, pad
    return sorted(rates[1:])[1]


def _samples(models: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[dict]:
    """Return continuations of every prompt by every model, at one temperature."""
    samples = []
    for prompt in PROMPTS:
        ids = encode_plain_text(tokenizer, prompt)
        for label, (name, sampler) in SAMPLED.items():
            model = models[name]
            settings = SamplingParams(SAMPLE_TEMPERATURE, sampler, max_new_tokens=SAMPLE_TOKENS, seed=seed)
            given = torch.tensor([ids], device=model.device)
            (new,), _ = continue_tokens(model, tokenizer, given, torch.ones_like(given), settings)
            text = decode_continuation(tokenizer, ids, new)
            samples.append({"model": label, "temperature": SAMPLE_TEMPERATURE, "prompt": prompt, "text": text})
    return samples
