import pytest
import tiny
import torch
from transformers import AutoModel

from calm import CalmAutoencoder
from calm.checkpoints.reference import save_reference


def test_saved_and_loaded_is_the_same(tmp_path):
    model = tiny.autoencoder()
    model.save_pretrained(tmp_path)
    for loaded in (CalmAutoencoder.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        for name, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name])
        assert loaded.config.latent_size == 8


def test_patches_are_encoded_alone():
    model, ids = tiny.autoencoder(), tiny.tokens(1, 12)
    changed = ids.clone()
    changed[:, 4:8] = 5
    before, after = model.encode(ids).mean, model.encode(changed).mean
    torch.testing.assert_close(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_dropout_acts_in_training_only():
    model, ids = tiny.autoencoder(token_dropout=0.5, latent_dropout=0.5), tiny.tokens(2, 8)
    noise = torch.zeros(2, 2, 8)
    assert torch.equal(model(ids, noise=noise).logits, model(ids, noise=noise).logits)
    model.train()
    assert not torch.equal(model(ids, noise=noise).logits, model(ids, noise=noise).logits)


def test_masked_labels_do_not_count():
    model, ids = tiny.autoencoder(), tiny.tokens(2, 8)
    noise = torch.randn(2, 2, 8)
    labels = ids.clone()
    labels[0, :3] = -100
    logits = model(ids, noise=noise).logits.flatten(1, 2)
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], ids[labels != -100])
    torch.testing.assert_close(model(ids, labels=labels, noise=noise).reconstruction_loss, expected)


def test_without_a_label_the_loss_is_that_of_the_kl_alone():
    model, ids = tiny.autoencoder(), tiny.tokens(2, 8)
    output = model(ids, labels=torch.full_like(ids, -100))
    assert output.reconstruction_loss == 0
    output.loss.backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())


def test_narrow_embeddings_make_the_vocabulary_product_cheaper(tmp_path):
    model, ids = tiny.autoencoder(embedding_size=4), tiny.tokens(2, 8)
    assert model.embed_tokens.weight.shape == (tiny.VOCAB_SIZE, 4)
    latents = model.encode(ids).mean
    logits = model.decode(latents)
    assert logits.shape == (2, 2, 4, tiny.VOCAB_SIZE)
    assert torch.equal(model.decode_tokens(latents), logits.argmax(-1))
    model.save_pretrained(tmp_path)
    assert torch.equal(CalmAutoencoder.from_pretrained(tmp_path).decode(latents), logits)
    with pytest.raises(ValueError, match="has no embedding_size of its own"):
        save_reference(model, tmp_path / "reference")


def test_tokens_are_decoded_alone_as_together():
    model = tiny.autoencoder()
    latents = torch.randn(5, 8)
    whole, decoder = model.decoder(latents), model.decoder
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        part = decoder.token_states(decoder.patch_states(latents), start, stop)
        torch.testing.assert_close(part, whole[:, start:stop])


def test_tokens_that_fill_no_patch_are_refused():
    with pytest.raises(ValueError, match="whole patches of 4 tokens, got 6"):
        tiny.autoencoder().encode(tiny.tokens(1, 6))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_encoder_layers", 3, "num_encoder_layers must be an even number of at least 2, got 3"),
        ("token_dropout", 1.0, r"token_dropout must lie in \[0, 1\), got 1.0"),
        ("token_dropout_id", 48, "token_dropout_id must be a token id, 0 to 47, got 48"),
        ("latent_size", 0, "latent_size must be at least 1, got 0"),
    ],
)
def test_impossible_configurations_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        tiny.autoencoder_config(**{field: value})
