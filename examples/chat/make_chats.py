"""Write a small set of chats and the tokenizer that formats them.

    python examples/chat/make_chats.py runs/quickstart/calm runs/small_chat.data

writes ``chats.jsonl`` (records of ``messages``) and ``tokenizer/`` (the model's tokenizer with the chat template beside
this file). The questions are simple: capitals, opposites, what comes after a day or month, sums. Most chats have one
question, some have two.
"""

import argparse
import json
import random
from pathlib import Path

from calm.data.tokenizer import load_tokenizer

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo",
    "Greece": "Athens", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Austria": "Vienna", "Chile": "Santiago",
    "Ireland": "Dublin", "Poland": "Warsaw", "Portugal": "Lisbon", "Russia": "Moscow", "Sweden": "Stockholm",
    "Germany": "Berlin", "Canada": "Ottawa", "Hungary": "Budapest", "Finland": "Helsinki", "Iraq": "Baghdad",
}  # fmt: skip
OPPOSITES = {
    "big": "small", "hot": "cold", "fast": "slow", "open": "closed", "early": "late", "full": "empty", "old": "new",
    "high": "low", "long": "short", "first": "last", "true": "false", "left": "right", "up": "down", "in": "out",
    "light": "dark", "hard": "soft", "near": "far", "wet": "dry", "loud": "quiet", "rich": "poor", "start": "end",
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December"]  # fmt: skip


def questions() -> list[tuple[str, str]]:
    """Return all questions with their answers."""
    pairs = [(f"What is the capital of {country}?", f"{city}.") for country, city in CAPITALS.items()]
    pairs += [(f"What is the opposite of {word}?", f"{other}.") for word, other in OPPOSITES.items()]
    for names in (DAYS, MONTHS):
        following = [*names[1:], names[0]]
        pairs += [(f"What comes after {name}?", f"{after}.") for name, after in zip(names, following, strict=True)]
    pairs += [(f"What is {a} plus {b}?", f"{a + b}.") for a in range(1, 10) for b in range(1, 10)]
    return pairs


def chats(seed: int = 0) -> list[list[dict[str, str]]]:
    """Return lists of messages: every question alone, and as many chats of two questions."""
    pairs = questions()
    others = random.Random(seed).sample(pairs, len(pairs))
    single = [_messages(pair) for pair in pairs]
    return single + [_messages(first, second) for first, second in zip(pairs, others, strict=True)]


def _messages(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    messages = []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def write(model: str, output: Path) -> None:
    """Write chats and tokenizer into the output directory."""
    output.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"messages": messages}) + "\n" for messages in chats()]
    (output / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = Path(__file__).with_name("template.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(output / "tokenizer")
    print(f"{len(lines)} chats: {output / 'chats.jsonl'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a small set of chats and the tokenizer that formats them.")
    parser.add_argument("model", help="directory of the model that will be fine-tuned")
    parser.add_argument("output", type=Path, help="directory for chats.jsonl and tokenizer/")
    arguments = parser.parse_args()
    write(arguments.model, arguments.output)
