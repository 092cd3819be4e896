"""The patches of one step, collected from groups of sequences that are sampled together."""

from collections.abc import Sequence

from calm.generation.model_runner import ModelRunner
from calm.generation.samplers import SampledPatches
from calm.serving.jobs import TokenLogprob


class NextPatches:
    """The next patches of all slots, as far as they are sampled."""

    def __init__(self, count: int, runner: ModelRunner):
        self.all: SampledPatches = SampledPatches.empty(count, runner.patch_size, runner.device)
        self.is_ready = [False] * count
        self.logprobs: dict[int, list[TokenLogprob]] = {}  # by slot, where they were requested

    def put(self, slots: list[int], patches: SampledPatches, rows: Sequence[int]) -> None:
        """Copy some rows of patches to the slots of their sequences."""
        rows = list(rows)
        if patches.logprobs is not None:
            listed = TokenLogprob.lists(patches.logprobs, patches.tokens)
            self.logprobs |= {slot: listed[row] for slot, row in zip(slots, rows, strict=True)}
        if len(rows) < len(patches.tokens):
            patches = SampledPatches(patches.tokens[rows], patches.num_samples[rows], patches.num_decoded[rows])
        if slots == list(range(len(self.is_ready))):
            # All sequences have the same parameters, the usual case: nothing is copied.
            tokens = patches.tokens.contiguous()  # its rows will be moved between slots
            self.all = SampledPatches(tokens, patches.num_samples, patches.num_decoded)
        else:
            self.all.put(slots, patches)
        for slot in slots:
            self.is_ready[slot] = True
