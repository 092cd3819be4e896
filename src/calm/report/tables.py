"""Results as tables for the terminal."""

from rich.table import Table


def brier_table(results: dict[str, dict], costs: dict[str, dict[str, str]] | None = None) -> Table:
    """BrierLM of several models, one row each; ``results`` as :meth:`BrierResult.to_dict` gives them.

    Args:
        costs: further cells of each model, by column heading.
    """
    first = next(iter(results.values()))
    table = Table(
        title="BrierLM (100 is best)",
        caption=f"{first['num_positions']:,} positions in {first['num_blocks']} blocks of {first['block_size']} "
        f"tokens, every {first['stride']} tokens; ± is one standard error over blocks",
    )
    headings = list(next(iter(costs.values()))) if costs else []
    table.add_column("model")
    for heading in ("BrierLM", "Brier-1", "Brier-2", "Brier-3", "Brier-4", "accuracy-1", "collision-1", *headings):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        cells = [f"{result['brier_lm']:.2f} ± {result['brier_lm_error']:.2f}"]
        cells += [f"{value:.2f}" for value in (*result["brier"], result["accuracy"][0], result["collision"][0])]
        cells += [(costs or {}).get(name, {}).get(heading, "") for heading in headings]
        table.add_row(name, *cells)
    return table


def reconstruction_table(results: dict[str, dict]) -> Table:
    """Reconstruction of several autoencoders; ``results`` as :meth:`ReconstructionResult.to_dict` gives them."""
    table = Table(title="Reconstruction")
    table.add_column("autoencoder")
    for heading in ("tokens from mean", "tokens from sample", "patches from sample", "KL (nats)", "live dimensions"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['token_accuracy_mean']:.2%}",
            f"{result['token_accuracy_sample']:.2%}",
            f"{result['patch_accuracy_sample']:.2%}",
            f"{result['kl']:.1f}",
            f"{result['live_dimensions']}/{result['latent_size']}",
        )
    return table
