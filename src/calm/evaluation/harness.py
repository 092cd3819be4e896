"""CALM in the lm-evaluation-harness: generative tasks work, those that ask for likelihoods with token prediction alone.

    from calm.evaluation.harness import CalmHarness
    lm_eval.simple_evaluate(model=CalmHarness("runs/calm", temperature=0.5), tasks=["gsm8k"])
    lm_eval.simple_evaluate(model=CalmHarness("runs/calm", sampler="mtp"), tasks=["hellaswag"])

Importing this module registers the model as ``calm``; ``calm harness`` is lm-eval's own command line with it.
"""

from dataclasses import replace
from inspect import signature
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from calm.checkpoints.loading import load_language_model
from calm.data.text import encode_plain_text
from calm.data.tokenizer import load_tokenizer
from calm.evaluation.likelihood import log_likelihoods
from calm.generation.completions import complete
from calm.generation.samplers import find_sampler
from calm.generation.sampling_params import SamplingParams
from calm.generation.settings import saved_sampling
from calm.models.context import context_of, room_for_prompt
from calm.models.modeling_calm import CalmForCausalLM
from calm.utils.device import resolve_device, resolve_dtype

_NO_LIKELIHOODS = (
    "the head of a CALM gives samples, not token probabilities, so log-likelihood tasks cannot be scored: choose tasks "
    "of output type generate_until (multiple-choice benchmarks often have a generative variant, such as "
    "mmlu_generative), BrierLM (`calm evaluate`) in the place of perplexity, or a model that was trained with a "
    "categorical flow head (sampler=direct) or token prediction (sampler=mtp), which have probabilities."
)

_LONGEST_WINDOW = 8192  # tokens of a text that is scored as a whole

_NOT_OURS = ("max_batch_size", "trust_remote_code", "unknown")


@register_model("calm")
class CalmHarness(TemplateLM):
    """A CALM for lm-eval.

    Args:
        pretrained: directory of a trained model, or a hub id.
        sampler: ``"direct"`` (a categorical flow head) and ``"mtp"`` score likelihoods as well.
        temperature: of all generation. Tasks that ask for greedy text (temperature 0) get this as well: the nearest a
            model without probabilities comes to it is a low temperature.
        max_gen_toks: new tokens where a task does not say.
        batch_size: prompts at a time.
    """

    def __init__(
        self,
        pretrained: str,
        temperature: float | str = 0.5,
        sampler: str | None = None,
        num_candidates: int | str | None = None,
        max_gen_toks: int | str = 256,
        batch_size: int | str = 8,
        seed: int | str = 0,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        max_batch_size: int | None = None,  # lm-eval passes it, and it means nothing here
        trust_remote_code: bool | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if trust_remote_code and str(trust_remote_code).lower() != "false":
            raise ValueError(
                "the model type calm runs no code of a checkpoint: leave trust_remote_code out of the command line and "
                "of model_args."
            )
        if unknown:
            allowed = [name for name in signature(CalmHarness).parameters if name not in _NOT_OURS]
            raise ValueError(f"unknown in model_args: {', '.join(unknown)}; allowed: {', '.join(allowed)}.")
        # lm-eval's command line says cuda:0 wherever it runs, unless told otherwise.
        target = resolve_device("auto" if device in (None, "cuda:0") else device)
        model = load_language_model(pretrained, resolve_dtype(dtype, target))
        if not isinstance(model, CalmForCausalLM):
            raise ValueError(f"{pretrained} is a token model, no CALM: take lm-eval's own model type `hf` for it.")
        self.model: Any = model.to(target)  # type: ignore[arg-type]
        self.tokenizer = load_tokenizer(tokenizer or pretrained)
        self.max_gen_toks, self.batch_size = int(max_gen_toks), int(batch_size)
        # Command lines give numbers as text.
        self.settings = SamplingParams(
            temperature=float(temperature),
            sampler=sampler,
            num_candidates=None if num_candidates is None else int(num_candidates),
            seed=int(seed),
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue every context until one of its stop texts, which is left out."""
        texts: list[str] = []
        bar = tqdm(total=len(requests), desc="generate", disable=disable_tqdm)
        for group in self._groups(requests):
            _, arguments = group[0].args
            stops = arguments.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            max_new_tokens = int(arguments.get("max_gen_toks") or self.max_gen_toks)
            settings = replace(self.settings, max_new_tokens=max_new_tokens, stop=tuple(stops))
            room = self._room(max_new_tokens)
            # A prompt too long for the context keeps its end, as lm-eval's own models do.
            prompts = [self.tok_encode(request.args[0])[-room:] for request in group]
            results = complete(self.model, self.tokenizer, prompts, settings, first=len(texts))
            texts += [_before(result["text"], stops) for result in results]
            bar.update(len(group))
        bar.close()
        return texts

    @property
    def eot_token_id(self) -> int:
        """Stands in front of texts without a context."""
        return self.model.config.separator_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return encode_plain_text(self.tokenizer, string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._check_likelihoods()
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: in windows of the context's length, as lm-eval's own models do."""
        self._check_likelihoods()
        texts = [
            [
                (("", ""), *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]),
                    self.eot_token_id,
                    min(self._room(1), _LONGEST_WINDOW),
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([window for text in texts for window in text], disable_tqdm))
        return [sum(next(found)[0] for _ in text) for text in texts]

    @property
    def _sampler(self) -> str:
        return self.settings.sampler or str(saved_sampling(self.model.generation_config)["sampler"])

    def _check_likelihoods(self) -> None:
        if not find_sampler(self._sampler).has_probabilities:
            raise ValueError(_NO_LIKELIHOODS)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        # Texts of one length beside each other: little padding.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        results: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(order), self.batch_size), desc="likelihood", disable=disable_tqdm):
            batch = order[start : start + self.batch_size]
            continuations = [requests[index][2] for index in batch]
            # A context that is too long keeps its end.
            contexts = [
                context[max(0, len(context) - self._room(len(continuation))) :]
                for (_, context, continuation) in (requests[index] for index in batch)
            ]
            results |= zip(batch, log_likelihoods(self.model, contexts, continuations, self._sampler), strict=True)
        return [results[index] for index in range(len(requests))]

    def _groups(self, requests: list[Instance]) -> list[list[Instance]]:
        """Neighbours with the same arguments, a batch at a time."""
        groups: list[list[Instance]] = []
        for request in requests:
            full = not groups or len(groups[-1]) == self.batch_size
            if full or groups[-1][0].args[1] != request.args[1]:
                groups.append([])
            groups[-1].append(request)
        return groups

    def _room(self, max_new_tokens: int) -> int:
        """Tokens of a prompt that leave room for the text."""
        config = self.model.config
        context = context_of(config)
        if context is None:
            return 2**31
        room = room_for_prompt(context, max_new_tokens, config.patch_size)
        if room < 1:
            raise ValueError(
                f"max_gen_toks={max_new_tokens} leaves no room for a prompt in a context of "
                f"{context * config.patch_size} tokens: take fewer."
            )
        return room


def _before(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
