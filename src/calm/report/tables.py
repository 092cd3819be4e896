"""Results as tables for the terminal."""

from datetime import timedelta

from rich import box
from rich.table import Table

from calm.evaluation.statistics import brier_difference

_TEXT = ("data_sha256", "block_size", "stride")  # of a result: what makes it comparable block by block


def brier_table(results: dict[str, dict], costs: dict[str, dict[str, str]] | None = None) -> Table:
    """BrierLM of several models, one row each; ``results`` as :meth:`BrierResult.to_dict` gives them.

    Args:
        costs: further cells of each model, by column heading, in place of accuracy and collision.
    """
    protocols: dict[str, list[str]] = {}
    for name, result in results.items():
        protocol = (
            f"{result['num_positions']:,} n-grams in {result['num_blocks']} blocks of {result['block_size']} tokens, "
            f"one every {result['stride']} tokens"
        )
        protocols.setdefault(protocol, []).append(name)
    several = [f"{', '.join(names)}: {protocol}" for protocol, names in protocols.items()]
    caption = "; ".join(several if len(protocols) > 1 else protocols)
    if any(result["brier_lm_error"] is not None for result in results.values()):
        caption += "; ± is a standard error"
    temperatures = {result["temperature"] for result in results.values()}
    title = "BrierLM (100 is best) and Brier-1 to Brier-4"
    if temperatures != {1} and len(temperatures) == 1:
        title += f" at temperature {temperatures.pop():g}"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("model", min_width=12, overflow="fold")
    more = list(next(iter(costs.values()))) if costs else ["accuracy-1", "collision-1"]
    for heading in ("BrierLM", "B-1", "B-2", "B-3", "B-4", *more):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        cells = [brier_cell(result)]
        cells += [score_cell(value) for value in result["brier"]]
        if costs:
            cells += [costs[name][heading] for heading in more]
        else:
            cells += [score_cell(result["accuracy"][0]), score_cell(result["collision"][0])]
        table.add_row(name, *cells)
    return table


def differences(results: dict[str, dict]) -> dict[str, tuple[float, float | None]]:
    """BrierLM of every model less that of the first, and its standard error, of those scored on the same text.

    Args:
        results: as :meth:`BrierResult.to_dict` gives them.
    """
    first, *others = results
    return {
        name: brier_difference(
            results[name]["block_brier"], results[first]["block_brier"], results[first].get("block_documents")
        )
        for name in others
        if "block_brier" in results[name] and "block_brier" in results[first]
        if all(results[name][each] == results[first][each] for each in _TEXT)
    }


def difference_cell(difference: tuple[float, float | None]) -> str:
    """A difference of two scores and its standard error, where one is known."""
    value, error = difference
    return f"{value:+z.2f}{_error_cell(error)}"


def difference_table(results: dict[str, dict]) -> Table | None:
    """How far models are from the first, block by block; None where nothing compares with it."""
    if not (found := differences(results)):
        return None
    caption = "A block is hard for all models alike: these errors are smaller than those of the scores."
    table = Table(title="BrierLM, difference to the first model", caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("model", min_width=12, overflow="fold")
    table.add_column("difference", justify="right", no_wrap=True)
    for name, difference in found.items():
        table.add_row(name, difference_cell(difference))
    return table


def brier_cell(result: dict) -> str:
    """BrierLM and its standard error, where there were enough blocks for one."""
    return score_cell(result["brier_lm"]) + _error_cell(result["brier_lm_error"])


def score_cell(value: float) -> str:
    """A score with two decimals; what rounds to zero has no sign."""
    return f"{value:z.2f}"


def _error_cell(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2f}"


def reconstruction_table(results: dict[str, dict]) -> Table:
    """Reconstruction of several autoencoders; ``results`` as :meth:`ReconstructionResult.to_dict` gives them."""
    table = Table(title="Held-out tokens that the autoencoder brings back", box=box.SIMPLE_HEAD)
    table.add_column("model", min_width=12, overflow="fold")
    # In two lines: a terminal of 80 columns has room for all of it.
    headings = ("from\nmean", "from\nsample", "whole\npatches", "noise\n0.3", "noise\n0.5", "KL\n(nats)", "live")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['token_accuracy_mean']:.2%}",
            f"{result['token_accuracy_sample']:.2%}",
            f"{result['patch_accuracy_sample']:.2%}",
            f"{result['token_accuracy_with_noise']['0.3']:.2%}",
            f"{result['token_accuracy_with_noise']['0.5']:.2%}",
            f"{result['kl']:.1f}",
            f"{result['live_dimensions']}/{result['latent_size']}",
        )
    return table


def cost_table(costs: dict[str, dict], tflops: float) -> Table:
    """What the models of a study cost; ``costs`` as :func:`calm.workflows.study.study_cost` gives them.

    Args:
        tflops: 10^12 operations per second, for the time that training takes at least.
    """
    left = sum(cost["training_flops"] for cost in costs.values() if not cost["is_done"])
    caption = (
        f"FLOPs and time of training, FLOPs per generated token. Still to train: {_flops(left)} FLOPs, "
        f"{_duration(left / (tflops * 1e12))} at {tflops:g} TFLOP/s"
    )
    table = Table(title="Cost of a study", caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("model", min_width=12, overflow="fold")
    for heading in ("parameters", "tokens", "FLOPs", "time", "per token", "done"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cost in costs.items():
        table.add_row(
            name,
            _flops(cost["parameters"]),
            _flops(cost["tokens"]),
            _flops(cost["training_flops"]),
            _duration(cost["training_flops"] / (tflops * 1e12)),
            _flops(cost["inference_flops_per_token"]),
            "yes" if cost["is_done"] else "",
        )
    return table


def compute_tables(document: dict) -> list[Table]:
    """Parameters, and operations of a generated token, by part; ``document`` as `calm info --json` prints it."""
    parameters = Table(title="Parameters", box=box.SIMPLE_HEAD, caption=_training_line(document))
    draws = document["candidates"]
    flops = Table(
        title="FLOPs per generated token",
        box=box.SIMPLE_HEAD,
        caption=f"{document['context']:,} positions of context, {draws} draw{'s' if draws > 1 else ''} per chunk at "
        f"temperature {document['temperature']:g}",
    )
    for table, key, show in ((parameters, "parameters", _count), (flops, "inference_flops_per_token", _flops)):
        values = document[key]
        table.add_column("part")
        table.add_column("", justify="right")
        table.add_column("share", justify="right")
        for name, value in values.items():
            if value:
                style = "bold" if name in ("total", "language_model", "autoencoder") else None
                table.add_row(name.replace("_", " "), show(value), f"{value / values['total']:.1%}", style=style)
    return [parameters, flops]


def _training_line(document: dict) -> str:
    line = f"training: {_flops(document['training_flops_per_token'])} FLOPs per token"
    if document["training_flops"] is None:
        return line + " (--tokens gives the total)"
    return f"{line}, {_flops(document['training_flops'])} for {_flops(document['training_tokens'])} tokens"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _flops(value: float) -> str:
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
