from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="directory of a trained model, CALM or baseline, or a hub id")],
    baseline: Annotated[str | None, typer.Option(help="a second model, shown beside the first on the page")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; any but this machine's needs a key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="one key per line, # for comments; requests need one as a bearer token")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="listen on other addresses without a key: everyone may generate"),
    ] = False,
    max_batch: Annotated[int, typer.Option(help="number of sequences that run at a time; each has a cache slot")] = 16,
    max_queue: Annotated[int, typer.Option(help="number of sequences that may wait; further requests get 503")] = 256,
    context: Annotated[
        int, typer.Option(help="tokens of prompt and continuation, at most the context of the model")
    ] = 4096,
    max_candidates: Annotated[
        int, typer.Option(help="largest num_candidates of a request; every step waits for these samples")
    ] = 1000,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant", help="rounding of a text does not depend on the requests beside it; slower steps"
        ),
    ] = False,
    drafter: Annotated[
        str | None, typer.Option(help="directory of a drafter of this token model: same text, fewer passes")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer, when the model has none beside it")] = None,
    name: Annotated[str | None, typer.Option(help="name of the model in requests; default: its directory")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="seconds that running requests have when the server shuts down")
    ] = 30.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; auto is float32 on a CPU")] = "auto",
) -> None:
    """Serve a model: OpenAI's API with continuous batching, and a page to try it.

    Example: `calm serve runs/quickstart/finished --baseline runs/quickstart/baseline`, then open http://127.0.0.1:8000
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"calm serve needs {error.name}, which is not installed: pip install 'calm-lm[serve]'."
        ) from error
    from calm.serving.run import run_server
    from calm.serving.service import Limits

    keys = [] if api_key_file is None else _read_keys(api_key_file)
    models = {name or _name_of(model): (model, tokenizer or model)}
    if baseline is not None:
        other = _name_of(baseline)
        models[other if other not in models else f"{other}-baseline"] = (baseline, baseline)
    limits = Limits(max_batch, max_queue, context, max_candidates, batch_invariant)
    run_server(
        models,
        limits,
        host,
        port,
        api_keys=keys,
        insecure=insecure,
        device=device,
        dtype=dtype,
        shutdown_timeout=shutdown_timeout,
        drafter=drafter,
    )


def _read_keys(path: Path) -> list[str]:
    if not path.is_file():
        from calm.utils.paths import did_you_mean

        raise ValueError(f"no file of API keys at {path}{did_you_mean(path)}")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path} has no API key: write one per line.")
    return keys


def _name_of(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model
