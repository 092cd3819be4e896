"""The head of docs/training.md, as a reader would write it."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from test_brier_lm import Blocks

from calm import CalmConfig, CalmForCausalLM
from calm.evaluation.brier_lm import evaluate_brier
from calm.evaluation.compute import compute
from calm.models.configuration_heads import HEAD_CONFIGS
from calm.models.heads import HEADS

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture
def gaussian():
    (code,) = re.findall(r"```python\n(import torch\n\nfrom calm.functional.rng.*?)```", GUIDE.read_text(), re.DOTALL)
    exec(code, {})
    yield "gaussian"
    del HEAD_CONFIGS["gaussian"], HEADS["gaussian"]


def test_a_head_of_ones_own_trains_writes_scores_and_is_saved(gaussian, tmp_path):
    config = CalmConfig(
        autoencoder_config=tiny.autoencoder_config(), backbone_config=tiny.backbone(), head_config={"type": gaussian}
    )
    model, ids = CalmForCausalLM(config), tiny.tokens(8, 32)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = CalmForCausalLM.from_pretrained(tmp_path)
    texts = [each.generate(ids[:2], max_new_tokens=8, generator=torch.Generator().manual_seed(0), eos_token_id=[])
             for each in (model.eval(), again)]  # fmt: skip
    assert torch.equal(*texts)
    assert again.generate(ids[:2], max_new_tokens=8, temperature=0.5).shape[1] > 32
    assert evaluate_brier(again, Blocks(ids, tiny.VOCAB_SIZE), stride=4, num_samples=2).num_blocks == 8
    assert compute(again, context=8).inference_flops_per_token["head"] > 0
