"""Continuing prompts of text: one, printed as it comes, or a file of them in batches."""

import codecs
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from calm.data.text import (
    ContinuationDecoder,
    decode_continuation,
    encode_plain_text,
    encode_plain_texts,
    half_character,
)
from calm.functional.temperature import LOWEST_TEMPERATURE, check_known_temperature
from calm.generation.prompts import left_padded
from calm.models.context import context_of, patch_size_of, positions_needed, room_for_new
from calm.models.layer_access import device_of
from calm.models.modeling_calm import CalmForCausalLM
from calm.utils.files import only_writer

# What a line of results has beside the fields of its prompt.
_RESULTS = {"text", "tokens", "tokens_per_second", "draws_per_chunk", "products_per_token", "settings"}


@dataclass
class SamplingSettings:
    """How to continue prompts; ``None`` leaves a setting to the model."""

    max_new_tokens: int = 128
    temperature: float | None = None
    sampler: str | None = None
    num_candidates: int | None = None
    seed: int = 0
    stop_strings: list[str] | None = None
    compile: bool = False

    def of_calm(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "sampler": self.sampler,
            "num_candidates": self.num_candidates,
            "stop_strings": self.stop_strings,
            "compile": self.compile,
        }

    def of_token_model(self) -> dict[str, Any]:
        """For transformers' ``generate``: plain sampling, as CALM's."""
        if self.temperature is not None:
            check_known_temperature(self.temperature)
        if self.sampler is not None or self.num_candidates is not None:
            raise ValueError(
                "sampler and num_candidates are settings of CALM, and this is a token model: leave them out."
            )
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": 1.0 if self.temperature is None else max(self.temperature, LOWEST_TEMPERATURE),
            "top_k": 0,
            "stop_strings": self.stop_strings,
        }


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    settings: SamplingSettings,
    streamer: BaseStreamer | None = None,
    first: int = 0,
) -> list[dict]:
    """Continue prompts together.

    Args:
        prompts: texts, or token ids.
        first: number of the first prompt. With CALM, prompt i has the random numbers of seed + i, whatever it is
            batched with.

    Returns:
        for every prompt its ``text`` and ``tokens`` (without what follows the end of text), the ``tokens_per_second``
        of them all and, for CALM, ``draws_per_chunk`` and ``products_per_token``.
    """
    rows = _encode(tokenizer, prompts, model)
    ids, mask = left_padded(rows, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
    ids, mask = ids.to(device_of(model)), mask.to(device_of(model))
    started = time.perf_counter()
    new, out = continue_tokens(model, tokenizer, ids, mask, settings, streamer, first)
    seconds = time.perf_counter() - started
    results = [
        {
            "text": decode_continuation(tokenizer, prompt, tokens),
            "tokens": len(tokens),
            "tokens_per_second": round(sum(map(len, new)) / seconds, 1),
        }
        for prompt, tokens in zip(rows, new, strict=True)
    ]
    if isinstance(model, CalmForCausalLM):
        for result, drawn, decoded in zip(results, out.num_drawn, out.num_decoded, strict=True):
            chunks = int((drawn > 0).sum())
            result["draws_per_chunk"] = round(int(drawn.sum()) / chunks, 2)
            result["products_per_token"] = round(int(decoded.sum()) / (chunks * model.config.patch_size), 2)
    return results


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    settings: SamplingSettings,
    streamer: BaseStreamer | None = None,
    first: int = 0,
) -> tuple[list[list[int]], Any]:
    """As :func:`complete`, of token ids ``[prompts, T]``: the new tokens of every prompt up to their end, and all that
    ``generate`` returned.
    """
    model_: Any = model
    if isinstance(model, CalmForCausalLM):
        generators = [torch.Generator(model.device).manual_seed(settings.seed + first + row) for row in range(len(ids))]
        out = model_.generate(
            ids, mask, generator=generators, streamer=streamer, tokenizer=tokenizer, return_dict_in_generate=True,
            **settings.of_calm(),
        )  # fmt: skip
        sequences = out.sequences
    else:
        _check_room(model, ids.shape[1], settings.max_new_tokens)
        device = device_of(model)
        # transformers' generate takes no generator
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(settings.seed + first)
            out = sequences = model_.generate(
                ids, attention_mask=mask, streamer=streamer, tokenizer=tokenizer, pad_token_id=tokenizer.pad_token_id,
                **settings.of_token_model(),
            )  # fmt: skip
    return [until_end(row, tokenizer, model) for row in sequences[:, ids.shape[1] :].tolist()], out


def _check_room(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """ValueError when a token model has not the positions, as CALM raises it."""
    context = context_of(model.config)
    if context is not None and positions_needed(prompt_tokens, max_new_tokens) > context:
        raise ValueError(
            f"the prompt of {prompt_tokens} tokens and max_new_tokens={max_new_tokens} do not fit the model's context "
            f"of {context}: shorten the prompt or ask for at most {room_for_new(context, prompt_tokens)} new tokens."
        )


def complete_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str | os.PathLike,
    output: str | os.PathLike,
    settings: SamplingSettings,
    batch_size: int = 8,
    advance: Callable[[int, int], None] | None = None,
) -> int:
    """Continue the ``prompt`` of every line of a JSONL file; a run that was killed goes on where it was.

    Args:
        output: gets the lines in order, with what :func:`complete` returns and the settings added.
        advance: called with the number of finished lines and of all lines.

    Returns:
        number of lines.
    """
    numbered, output = _read_prompts(source), Path(output)
    records = [record for _, record in numbered]
    _check_absent(output)
    prompts = encode_plain_texts(tokenizer, [record["prompt"] for record in records])
    _check_lengths(model, [number for number, _ in numbered], prompts, source, settings)
    draft = output.with_name(f".{output.name}.partial")
    said = {"model": str(getattr(model, "name_or_path", ""))} | {
        name: value for name, value in vars(settings).items() if name not in ("seed", "compile") and value is not None
    }
    if not isinstance(model, CalmForCausalLM):
        said["batch_size"] = batch_size  # a batch has one stream of random numbers
    output.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(output):
        _check_absent(output)  # another process may have finished it meanwhile
        _fill(draft, model, tokenizer, records, prompts, settings, said, batch_size, advance)
        draft.replace(output)
    return len(records)


def _check_absent(output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} is there already: choose another file, or remove it.")


def _fill(
    draft: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict],
    prompts: list[list[int]],
    settings: SamplingSettings,
    said: dict,
    batch_size: int,
    advance: Callable[[int, int], None] | None,
) -> None:
    """Add to an unfinished output what it lacks."""
    done = _finished_lines(draft, records, said, settings.seed)
    for start in range(done, len(records), batch_size):
        if advance is not None:
            advance(start, len(records))
        batch = records[start : start + batch_size]
        results = complete(model, tokenizer, prompts[start : start + batch_size], settings, first=start)
        with draft.open("a", encoding="utf-8") as file:
            for number, (record, result) in enumerate(zip(batch, results, strict=True), start=start):
                line = record | result | {"settings": said | {"seed": settings.seed + number}}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if not records:
        draft.touch()
    if advance is not None:
        advance(len(records), len(records))


def _check_lengths(
    model: PreTrainedModel,
    numbers: list[int],
    prompts: list[list[int]],
    source: str | os.PathLike,
    settings: SamplingSettings,
) -> None:
    """ValueError for a prompt that the model's context does not hold, before any text is written."""
    context, patch_size = context_of(model.config), patch_size_of(model.config)
    if context is None:
        return
    for number, prompt in zip(numbers, prompts, strict=True):
        if positions_needed(len(prompt), settings.max_new_tokens, patch_size) > context:
            raise ValueError(
                f"{source} line {number}: a prompt of {len(prompt)} tokens and max_new_tokens="
                f"{settings.max_new_tokens} do not fit the model's context of {context * patch_size} tokens: shorten "
                "the prompt, or ask for fewer."
            )


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[int]], model: PreTrainedModel
) -> list[list[int]]:
    """Return the ids of every prompt; an empty prompt of a token model is its end-of-text token."""
    for prompt in prompts:
        if isinstance(prompt, str) and (place := half_character(prompt)) is not None:
            raise ValueError(f"the prompt {prompt!r:.60} is not UTF-8 text (character {place}).")
    rows = [encode_plain_text(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if not isinstance(model, CalmForCausalLM):
        rows = [row or [tokenizer.eos_token_id] for row in rows]
    return rows


class PrintingStreamer(BaseStreamer):
    """Print a prompt and its continuation as ``generate`` passes them on, without control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._decoder = ContinuationDecoder(tokenizer)

    def put(self, value: torch.Tensor) -> None:
        print(self._decoder.add(value.flatten().tolist()), end="", flush=True)

    def end(self) -> None:
        print(self._decoder.add([], last=True), flush=True)


def until_end(tokens: list[int], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> list[int]:
    """Without the end of text (the tokenizer's, or one the model knows) and what follows it, and without the padding
    behind a text that ended otherwise."""
    known: Any = None if model is None else model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    while stop and tokens[stop - 1] == tokenizer.pad_token_id:
        stop -= 1
    return tokens[:stop]


def _read_prompts(source: str | os.PathLike) -> list[tuple[int, dict]]:
    """Numbers of lines and what they hold."""
    records = []
    for number, line in _lines(Path(source)):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} line {number} is not JSON: {error}.") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(
                f'{source} line {number} has no text "prompt": every line must be like {{"prompt": "Once"}}.'
            )
        if half_character(json.dumps(record, ensure_ascii=False)) is not None:
            raise ValueError(f"{source} line {number} holds half of a surrogate pair, which is no text.")
        if taken := _RESULTS & record.keys():
            raise ValueError(
                f"{source} line {number} has a field {min(taken)!r}, which the result would replace: rename it."
            )
        records.append((number, record))
    return records


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} line {number} is not UTF-8 text: {error.reason}.") from error
        if text.strip():
            yield number, text


def _finished_lines(draft: Path, records: list[dict], said: dict, seed: int) -> int:
    """Whole lines of an unfinished output; a line cut short is removed from it."""
    if not draft.exists():
        return 0
    lines = draft.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    for number, line in enumerate(whole):
        record = json.loads(line)
        same = number < len(records) and records[number].items() <= record.items()
        if not same or record["settings"] != said | {"seed": seed + number}:
            raise ValueError(
                f"{draft} is the unfinished output of other prompts or settings: go on with those, or remove it."
            )
    draft.write_bytes(b"".join(whole))
    return len(whole)
