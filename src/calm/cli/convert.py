from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Layout(StrEnum):
    CALM = "calm"
    REFERENCE = "reference"


def convert(
    source: Annotated[str, typer.Argument(help="directory or hub id of a model, in either layout")],
    destination: Annotated[Path, typer.Argument(help="new directory")],
    to: Annotated[Layout, typer.Option(help="layout to write")] = Layout.CALM,
    autoencoder: Annotated[
        str | None, typer.Option(help="autoencoder of a language model that comes without one")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer to put beside the model; default the source's, if it has one")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of the weights: auto (as saved), float32, bfloat16, float16")] = "auto",
) -> None:
    """Translate checkpoints between this package's layout and the reference implementation's.

    A converted model is self-contained (safetensors, with its autoencoder and tokenizer), and every command takes it.

    Example: `calm convert cccczshao/CALM-M calm-m --autoencoder cccczshao/CALM-Autoencoder --tokenizer llama3`
    """
    from calm.checkpoints.loading import load_autoencoder, load_model
    from calm.checkpoints.reference import save_reference
    from calm.data.tokenizer import has_tokenizer, load_tokenizer, save_for_transformers_4
    from calm.models.modeling_autoencoder import CalmAutoencoder
    from calm.models.modeling_calm import CalmForCausalLM
    from calm.utils.device import resolve_dtype
    from calm.utils.files import check_free, staged_directory

    check_free(destination)
    precision = resolve_dtype(dtype)
    inner = load_autoencoder(autoencoder, precision) if autoencoder is not None else None
    model = load_model(source, precision, inner)
    if not isinstance(model, CalmAutoencoder | CalmForCausalLM):
        raise ValueError(f"{source} holds a {type(model).__name__}: only autoencoders and CALMs have two layouts.")
    with staged_directory(destination) as draft:
        if to == Layout.REFERENCE:
            save_reference(model, draft, final_path=destination)
        else:
            model.save_pretrained(draft)
        if tokenizer is not None or has_tokenizer(source):
            own_tokenizer = load_tokenizer(tokenizer or source)
            if to == Layout.REFERENCE:
                save_for_transformers_4(own_tokenizer, draft)
            else:
                own_tokenizer.save_pretrained(draft)
    print(f"{type(model).__name__}: {destination}")
    if not has_tokenizer(destination):
        print("no tokenizer beside it: pass --tokenizer to `calm generate` and `calm evaluate`, or convert with one.")
