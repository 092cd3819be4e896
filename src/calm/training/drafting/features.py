"""Hidden states of a target over texts, computed once and kept on disk.

One pass of the target costs more than one of a drafter, and a drafter passes over the same texts several times.
Features are float16 in one memory-mapped file; texts are stored one after the other.

Shapes: N positions of all texts, F features.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calm.utils.files import write_json

_TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class DraftText:
    """A text to train on: token ids, and how many of them are the prompt, whose continuation is not drafted."""

    token_ids: tuple[int, ...]
    num_prompt: int


class FeatureCache:
    """Features ``[N, F]``, token ids ``[N]`` and targets ``[N]`` of texts, in a directory."""

    def __init__(self, directory: Path):
        info = json.loads((directory / "features.json").read_text(encoding="utf-8"))
        self.starts: list[int] = info["starts"]  # of every text, and the end of the last
        shape = (self.starts[-1], info["feature_size"])
        self.features = np.memmap(directory / "features.f16", dtype=np.float16, mode="r", shape=shape)
        self.token_ids = np.load(directory / "token_ids.npy")
        self.is_target = np.load(directory / "is_target.npy")  # tokens of continuations

    def __len__(self) -> int:
        return len(self.starts) - 1

    def text(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return features ``[T, F]`` float32, token ids ``[T]`` and which of them are to be drafted ``[T]``."""
        span = slice(self.starts[index], self.starts[index + 1])
        return (
            torch.from_numpy(self.features[span].astype(np.float32)),
            torch.from_numpy(self.token_ids[span]),
            torch.from_numpy(self.is_target[span]),
        )


@torch.no_grad()
def write_features(
    target: Any,
    texts: Sequence[DraftText],
    feature_layers: Sequence[int],
    directory: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> FeatureCache:
    """Run the target over texts and write its features. An interrupted run continues after its last complete pass."""
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "features.json").exists():
        return FeatureCache(directory)
    starts = np.concatenate([[0], np.cumsum([len(text.token_ids) for text in texts])])
    feature_size = len(feature_layers) * target.config.get_text_config().hidden_size
    progress = directory / "progress.json"
    done = json.loads(progress.read_text(encoding="utf-8"))["texts"] if progress.exists() else 0
    features = np.memmap(
        directory / "features.f16", np.float16, "r+" if done else "w+", shape=(int(starts[-1]), feature_size)
    )
    while done < len(texts):
        stop = done + 1
        while stop < len(texts) and starts[stop + 1] - starts[done] <= _TOKENS_PER_PASS:
            stop += 1
        batch = [torch.tensor(text.token_ids) for text in texts[done:stop]]
        # Attention is causal: padding after a text does not change its hidden states.
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(target.device)
        outputs = target.base_model(ids, use_cache=False, output_hidden_states=True)
        hidden = torch.cat([outputs.hidden_states[layer] for layer in feature_layers], dim=-1)
        for row, index in enumerate(range(done, stop)):
            features[starts[index] : starts[index + 1]] = hidden[row, : len(batch[row])].half().cpu().numpy()
        features.flush()
        done = stop
        write_json(progress, {"texts": done})
        if on_progress is not None:
            on_progress(int(starts[done]), int(starts[-1]))
    np.save(directory / "token_ids.npy", np.concatenate([np.array(text.token_ids, np.int64) for text in texts]))
    is_target = [np.arange(len(text.token_ids)) >= text.num_prompt for text in texts]
    np.save(directory / "is_target.npy", np.concatenate(is_target))
    write_json(directory / "features.json", {"starts": starts.tolist(), "feature_size": feature_size})
    return FeatureCache(directory)
