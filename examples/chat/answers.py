"""Ask a model all questions of `make_chats.py` and count the right answers: `python examples/chat/answers.py MODEL`."""

import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from calm import SamplingParams
from calm.checkpoints.loading import load_model
from calm.data.text import render_chat
from calm.data.tokenizer import load_tokenizer
from calm.generation.completions import complete

sys.path.insert(0, str(Path(__file__).parent))
from make_chats import questions

BATCH_SIZE = 16


def wrong_answers(model: Any, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> list[str]:
    """Return a line for every question whose most likely answer is not the expected one."""
    settings = SamplingParams(max_new_tokens=12, temperature=0.0, sampler="direct")
    wrong = []
    for first in range(0, len(pairs), BATCH_SIZE):
        batch = pairs[first : first + BATCH_SIZE]
        prompts = [render_chat(tokenizer, [{"role": "user", "content": question}], True) for question, _ in batch]
        for (question, expected), result in zip(batch, complete(model, tokenizer, prompts, settings), strict=True):
            if result["text"].strip() != expected:
                wrong.append(f"{question} {expected} Answered: {result['text'].strip()}")
    return wrong


if __name__ == "__main__":
    wrong = wrong_answers(load_model(sys.argv[1]), load_tokenizer(sys.argv[1]), questions())
    print("\n".join(wrong[:10]))
    print(f"{len(questions()) - len(wrong)} of {len(questions())} answers are right")
