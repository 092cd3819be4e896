"""A served model: its engine, its tokenizer, and the jobs of requests."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.text import encode_chat, encode_plain_text
from calm.generation.drafting import check_target
from calm.generation.model_runner import model_runner
from calm.generation.sampling_params import SamplingParams
from calm.models.drafters import Drafter
from calm.serving.batch_invariance import check_batch_invariance
from calm.serving.drafted_engine import DraftedEngine
from calm.serving.engine import Engine
from calm.serving.jobs import Delta, Job
from calm.serving.schemas import ChatRequest, CompletionRequest, SamplingRequest
from calm.serving.telemetry import Metrics, Telemetry


@dataclass
class Limits:
    """
    Args:
        max_batch: sequences that run at a time.
        max_queue: sequences that may wait.
        context: tokens of prompt and continuation together; at most the context of the model.
        max_candidates: largest num_candidates of a request; a step of all sequences waits for these samples.
        batch_invariant: whether the text of a request must not depend on the requests beside it, not even by rounding.
    """

    max_batch: int = 16
    max_queue: int = 256
    context: int = 4096
    max_candidates: int = 1000
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "context", "max_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


class Service:
    """One model under a name, with a drafter or without."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        metrics: Metrics,
        drafter: Drafter | None = None,
    ):
        if drafter is not None:
            check_target(model)
        self.name, self.tokenizer = name, tokenizer
        self.runner = runner = model_runner(model.eval())
        runner.check_steps("served")
        self.defaults = runner.resolve(SamplingParams())  # settings in the model's files must fit it
        self.is_calm = runner.kind == "calm"
        self.patch_size = runner.patch_size
        context = min(limits.context, (runner.context or limits.context) * runner.patch_size)
        if context < 2 * runner.patch_size:
            raise ValueError(f"context must be at least {2 * runner.patch_size} tokens for {name}, got {context}.")
        self.max_candidates = limits.max_candidates
        if limits.batch_invariant:
            check_batch_invariance(runner.backbone_config, name)
        telemetry = Telemetry(metrics, name)
        rest = (runner, tokenizer, limits.max_batch, context, limits.max_queue, telemetry, limits.batch_invariant)
        if drafter is None:
            self.engine = Engine(*rest)
            return
        if limits.batch_invariant:
            raise ValueError("--batch-invariant and --drafter exclude each other: leave out one of them.")
        self.engine = DraftedEngine(drafter.to(runner.device).attach(model), *rest)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        """Return the entry of `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "calm",
            "kind": self.runner.kind,
            "patch_size": self.patch_size,
            "context": self.engine.context,
            "samplers": self.runner.samplers,
            "sampler": self.defaults.sampler,
            "temperature": self.defaults.temperature,
            "chat": self.tokenizer.chat_template is not None,
        }

    def sampling_params(self, request: SamplingRequest, max_tokens: int) -> SamplingParams:
        """Return the checked parameters of a request; ValueError for those that the model cannot follow."""
        if (request.num_candidates or 0) > self.max_candidates:
            raise ValueError(
                f"num_candidates: this server allows at most {self.max_candidates}, got {request.num_candidates}"
            )
        return self.runner.resolve(request.sampling_params(max_tokens))

    def encode_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Return the token ids of all prompts; ValueError for none, or for more texts than can run and wait."""
        prompts = request.prompts
        self._check_count(len(prompts), request.n)
        return [prompt if isinstance(prompt, list) else encode_plain_text(self.tokenizer, prompt) for prompt in prompts]

    def _check_count(self, num_prompts: int, num_texts: int) -> None:
        most = self.engine.max_batch + self.engine.max_queue
        if not 0 < num_prompts * num_texts <= most:
            raise ValueError(
                f"{num_prompts} prompts with {num_texts} texts each were requested; 1 to {most} texts are possible at "
                "once"
            )

    def encode_chat(self, request: ChatRequest) -> list[int]:
        """Return the token ids of a conversation; ValueError when there is no template, or when it refuses them."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{self.name} has no chat template: it continues texts and was not trained to answer. Use "
                "/v1/completions, or fine-tune it on messages."
            )
        self._check_count(1, request.n)
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            return encode_chat(self.tokenizer, messages, add_generation_prompt=True)
        except Exception as error:  # templates raise errors of any type
            raise ValueError(f"the chat template does not accept these messages: {error}") from error

    def jobs(
        self, request: SamplingRequest, prompts: list[list[int]], max_tokens: int, emit: Callable[[int, Delta], None]
    ) -> list[Job]:
        """Return a checked job for every text of every prompt; text i has the seed of the request plus i."""
        seed = request.seed if request.seed is not None else secrets.randbits(32)
        params = self.sampling_params(request, max_tokens)
        jobs = []
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(request.n)):
            emit_one = lambda delta, index=index: emit(index, delta)  # noqa: E731
            jobs.append(Job(prompt, replace(params, seed=(seed + index) % 2**63), emit_one))
            self.engine.check(jobs[-1])
        return jobs

    def memory(self) -> str:
        """Return the size of the cache, as a text for the line at the start."""
        cache = self.engine.cache
        size = f"{cache.num_bytes / 2**20:,.0f} MiB"
        positions = f"{cache.num_slots} slots of {self.engine.context} tokens ({cache.num_positions} positions)"
        return f"key/value cache {size}: {positions}, {str(self.runner.dtype).removeprefix('torch.')}"
