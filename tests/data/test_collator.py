"""Texts of any length as batches of whole patches, in a loop and in a plain Trainer of transformers."""

import pytest
import tiny
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from calm.data.collator import PatchCollator
from calm.data.tokenizer import train_tokenizer

EOS = tiny.EOS


def test_every_token_of_a_text_counts_and_so_does_its_end():
    batch = PatchCollator(4, EOS)([{"input_ids": [5, 6, 7, 8, 9, EOS]}, {"input_ids": [5], "labels": [-100]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, EOS, EOS, EOS], [5] + [EOS] * 7]
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 9, EOS, EOS, EOS], [-100] * 8]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 4 + [0] * 4]
    # The loss of a text is what it is alone.
    model, alone = tiny.calm(), PatchCollator(4, EOS)([{"input_ids": [5, 6, 7, 8, 9, EOS]}])
    noise = torch.rand(4, 2, 1, 6, generator=torch.Generator().manual_seed(0)) - 0.5
    target_noise = torch.randn(8, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    together = model(**batch, noise=noise, target_noise=target_noise).loss
    torch.testing.assert_close(model(**alone, noise=noise[:, :1], target_noise=target_noise[:, :1]).loss, together)


def test_long_texts_are_cut():
    assert PatchCollator(4, EOS, max_length=8)([{"input_ids": list(range(2, 30))}])["input_ids"].shape == (1, 8)
    with pytest.raises(ValueError, match="max_length must be a multiple of the patch size 4, got 6"):
        PatchCollator(4, EOS, max_length=6)
    with pytest.raises(ValueError, match="got 2 tokens and 1 labels"):
        PatchCollator(4, EOS)([{"input_ids": [3, 4], "labels": [3]}])


def test_a_plain_trainer_takes_both_models(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    texts = [{"input_ids": [2 + (i + j) % 4 for j in range(5 + i % 6)] + [EOS]} for i in range(32)]
    tokenizer = train_tokenizer(["the cat sat on the mat."] * 5, 270)
    tokenizer.padding_side = "right"
    collators = {
        "calm": (tiny.calm(), PatchCollator(4, EOS)),
        "autoencoder": (
            tiny.autoencoder(),
            DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=4),
        ),
    }
    for model, collator in collators.values():
        before = loss(model, collator(texts))
        Trainer(model, arguments, train_dataset=texts, data_collator=collator).train()
        assert loss(model, collator(texts)) < before


@torch.no_grad()
def loss(model, batch):
    return model.eval()(**batch, generator=torch.Generator().manual_seed(0)).loss.item()
