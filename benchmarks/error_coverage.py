"""How often does one standard error around a BrierLM score hold the true value? A simulation; 68% are due.

    python benchmarks/error_coverage.py [--texts 600]

Blocks are lognormal and as unequal as those of real text; blocks of one document are equal. Errors are those over known
documents and those over runs of neighbouring blocks.
"""

import argparse

import torch
from torch import Tensor

from calm.evaluation.statistics import brier_errors
from calm.functional.brier import brier_lm

MEAN = torch.tensor([0.10, 0.03, 0.012, 0.006], dtype=torch.float64)
SPREAD = torch.tensor([0.3, 0.6, 0.9, 1.2], dtype=torch.float64)
DOCUMENTS = ("1 block", "4 blocks", "3 blocks", "4 blocks on average")


def blocks_of_text(num_blocks: int, documents: str) -> tuple[Tensor, Tensor]:
    """Brier scores of the blocks of one text ``[blocks, 4]``, and the document of each block ``[blocks]``."""
    length = int(documents[0])
    document = torch.arange(num_blocks) // length
    if documents.endswith("average"):
        document = (torch.rand(num_blocks) < 1 / length).cumsum(0)
    shared = torch.randn(num_blocks + 1, 1, dtype=torch.float64)[document]
    own = torch.randn(num_blocks + 1, 4, dtype=torch.float64)[document]
    return MEAN * torch.exp(SPREAD * (0.8 * shared + 0.6 * own) - SPREAD**2 / 2), document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=600)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"| blocks | {' | '.join(DOCUMENTS)} |\n|{'---:|' * (1 + len(DOCUMENTS))}")
    for num_blocks in (32, 64, 128, 512):
        cells = []
        for documents in DOCUMENTS:
            inside = {"documents": 0, "runs": 0}
            for _ in range(arguments.texts):
                brier, document = blocks_of_text(num_blocks, documents)
                deviation = abs(brier_lm(brier.mean(0)) - brier_lm(MEAN)).item()
                for name, known in (("documents", document.tolist()), ("runs", None)):
                    errors = brier_errors(brier, known)
                    assert errors is not None
                    inside[name] += deviation < errors[0]
            cells.append(" / ".join(f"{count / arguments.texts:.0%}" for count in inside.values()))
        print(f"| {num_blocks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
