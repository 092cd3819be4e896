"""The categorical flow head and its token codes: exact laws by enumeration, and what it refuses."""

import itertools

import golden
import pytest
import tiny
import torch
import torch.nn.functional as F

from calm import CalmConfig, CalmForCausalLM
from calm.models import linear_cross_entropy
from calm.models.configuration_codes import TokenCodesConfig
from calm.models.heads.categorical_flow import CategoricalFlowHeadConfig
from calm.models.modeling_codes import TokenCodes

SMALL = 5  # tokens of a vocabulary whose patches can be enumerated


def small_model(patch_size=2, **head):
    """A model whose network sees its inputs, over a vocabulary of five tokens."""
    model = tiny.calm(patch_size, type="categorical_flow", vocab_size=SMALL, **head)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.network.output_layer.weight, std=1.0)
    return model


def all_patches(patch_size):
    return torch.tensor(list(itertools.product(range(SMALL), repeat=patch_size)))


def log_probs(head, hidden, temperature=1.0):
    """Log-probabilities of all patches after one state: ``[patches]``."""
    patches = all_patches(head.patch_size)
    return head.log_probabilities(hidden, patches[:, None], temperature)[0].sum(-1)[:, 0]


@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("shortlist", [None, 3])
def test_probabilities_of_all_patches_add_up_to_one(num_passes, temperature, shortlist):
    head = small_model(3, num_passes=num_passes, shortlist_size=shortlist).head
    torch.testing.assert_close(log_probs(head, torch.randn(1, 16), temperature).exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("shortlist", [None, 3])
def test_samples_have_the_law_that_log_prob_gives(temperature, shortlist):
    model = small_model(2, shortlist_size=shortlist)
    head, hidden, count = model.head, torch.randn(1, 16), 20_000
    generator = torch.Generator().manual_seed(0)
    latents, log_prob = head.sample(
        hidden, num_samples=count, generator=generator, temperature=temperature, return_log_prob=True
    )
    tokens = model.autoencoder.decode_tokens(latents)[:, 0]
    expected = log_probs(head, hidden, temperature)
    index = (tokens * torch.tensor([SMALL, 1])).sum(-1)
    torch.testing.assert_close(log_prob[:, 0].sum(-1), expected[index])
    observed, expected = torch.bincount(index, minlength=SMALL**2), expected.exp() * count
    chi_square = ((observed - expected).square() / expected.clamp(min=1e-9))[expected > 5].sum()
    assert chi_square < 60  # at most 24 degrees of freedom: exceeded with probability below 1e-4


def test_an_untrained_network_leaves_multi_token_prediction():
    """The network's last layer starts at zero: both tokens have the law of the first pass."""
    head = small_model(2).head
    torch.nn.init.zeros_(head.network.output_layer.weight)
    hidden = torch.randn(1, 16)
    logits = F.linear(head.base_proj(hidden).view(2, 16), head._tables[0].weight)
    first, second = logits.log_softmax(-1)
    golden.close(log_probs(head, hidden), (first[:, None] + second).flatten())


def test_passes_choose_growing_parts_of_a_patch():
    schedules = {(1, None): [0], (2, None): [0, 1], (4, None): [0, 1, 2], (8, None): [0, 1, 2, 4], (8, 3): [0, 2, 4],
                 (4, 4): [0, 1, 2, 3], (4, 2): [0, 2], (2, 5): [0, 1]}  # fmt: skip
    for (patch_size, num_passes), expected in schedules.items():
        assert CategoricalFlowHeadConfig(num_passes=num_passes).schedule(patch_size) == expected


def test_greedy_decoding_takes_the_most_likely_token_of_every_pass():
    model = small_model(2)
    head, hidden = model.head, torch.randn(6, 16)
    tokens = model.autoencoder.decode_tokens(head.sample(hidden, temperature=0.0))
    for row in range(6):
        law = log_probs(head, hidden[row : row + 1]).view(SMALL, SMALL)
        first = law.logsumexp(1).argmax()
        assert tokens[row].tolist() == [first, law[first].argmax()]
    assert head.log_probabilities(hidden, tokens)[1].all()
    assert not head.log_probabilities(hidden, (tokens + 1) % SMALL)[1][:, 0].any()


def test_a_shortlist_of_the_whole_vocabulary_changes_nothing():
    whole, listed = small_model(3), small_model(3, shortlist_size=SMALL)
    listed.load_state_dict(whole.state_dict())
    hidden, noise = torch.randn(2, 16), torch.rand(5, 2, 3)
    golden.close(whole.head.sample(hidden, noise), listed.head.sample(hidden, noise))


def test_a_sample_does_not_depend_on_how_positions_are_tiled(monkeypatch):
    from calm.models.heads import categorical_flow as module

    head, hidden, noise = small_model(3, shortlist_size=3).head, torch.randn(9, 16), torch.rand(2, 9, 3)
    expected = head.sample(hidden, noise, return_log_prob=True)
    monkeypatch.setattr(module, "_SAMPLING_ELEMENTS", 2 * 3 * SMALL)
    torch.testing.assert_close(head.sample(hidden, noise, return_log_prob=True), expected)


def test_loss_and_gradients_do_not_depend_on_tiles(monkeypatch):
    model, ids = small_model(2).train(), torch.randint(SMALL, (2, 12))

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    monkeypatch.setattr(linear_cross_entropy, "_TILE_ELEMENTS", 3 * SMALL)
    found = gradients()
    torch.testing.assert_close(found, expected)


def test_the_loss_is_that_of_the_probabilities_that_sampling_uses():
    """Passes that follow each other: their log-probabilities add up to that of the patch."""
    model = small_model(4)
    head, hidden = model.head, torch.randn(1, 1, 16)
    posterior = model.autoencoder.encode(torch.randint(SMALL, (1, 4)))
    second, third = (
        head.loss(hidden, posterior, torch.tensor([[noise]])).metrics["later_cross_entropy"] for noise in (0.1, 0.9)
    )
    labels = posterior.token_ids[0, 0]
    base = F.linear(head.base_proj(hidden[0, 0]).view(4, -1), head._tables[0].weight).log_softmax(-1)
    # The second pass predicts three tokens, of which it chooses the first; the third pass predicts and chooses two.
    states = (
        head.base_proj(hidden[0]).view(4, -1)
        + head._later_states(hidden[0], head._tables[0](labels[None, None, :1]))[0, 0]
    )
    of_second = F.linear(states, head._tables[0].weight).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    golden.close(second[0, 0], -of_second[1:].mean())
    total = base[0, labels[0]] + of_second[1] - 2 * third[0, 0]
    golden.close(head.log_probabilities(hidden[0, 0][None], labels[None])[0].sum(), total)


def test_later_passes_do_not_train_the_backbone():
    model, ids = small_model(2).train(), torch.randint(SMALL, (2, 12))
    hidden = model(ids).last_hidden_state[:, :-1].detach().requires_grad_()
    loss = model.head.loss(hidden, model.autoencoder.encode(ids[:, 2:])).metrics["later_cross_entropy"].sum()
    assert torch.autograd.grad(loss, [hidden], allow_unused=True) == (None,)


def test_training_finds_a_dependence_between_the_tokens_of_a_patch():
    """Two tokens that are always equal and otherwise uniform: independent prediction would agree in one of five."""
    torch.manual_seed(0)
    model = CalmForCausalLM(small_model(2, hidden_size=32).config)
    head, hidden = model.head, torch.ones(64, 16)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(150):
        token = torch.randint(SMALL, (64, 1)).expand(-1, 2)
        loss = head.loss(hidden, model.autoencoder.encode(token.flatten()[None]).__class__(
            F.embedding(token, model.autoencoder.codes).flatten(-2), torch.zeros(64, 8), token
        )).loss.mean()  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens = model.autoencoder.decode_tokens(head.sample(hidden[:1], num_samples=500))[:, 0]
    assert (tokens[:, 0] == tokens[:, 1]).float().mean() > 0.9
    assert torch.bincount(tokens[:, 0], minlength=SMALL).min() > 20


def test_token_codes_reconstruct_a_large_vocabulary_exactly():
    codes = TokenCodes(TokenCodesConfig(vocab_size=128_257, patch_size=4, code_size=32))
    ids = torch.randint(128_257, (1, 512), generator=torch.Generator().manual_seed(0))
    assert torch.equal(codes.decode_tokens(codes.encode(ids).mean).flatten(1), ids)
    half = codes.encode(ids).mean.bfloat16()
    assert torch.equal(codes.decode_tokens(half).flatten(1), ids)


def test_token_codes_have_a_device_and_a_type_without_parameters():
    codes = TokenCodes(TokenCodesConfig(vocab_size=9, patch_size=2, code_size=4))
    assert (codes.device, codes.dtype) == (torch.device("cpu"), torch.float32)
    assert codes.to(torch.bfloat16).dtype == torch.bfloat16


def test_codes_that_are_too_close_are_refused():
    with pytest.raises(ValueError, match=r"code_size 2 is too small for 5000 tokens.*Use a larger code_size"):
        TokenCodes(TokenCodesConfig(vocab_size=5000, patch_size=2, code_size=2)).check_codes()
    TokenCodes(TokenCodesConfig(vocab_size=5000, patch_size=2, code_size=16)).check_codes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_passes": 1}, "num_passes must be at least 2"),
        ({"shortlist_size": 0}, "shortlist_size must be at least 1"),
        ({"shortlist_size": 49}, "shortlist_size must be at most the vocabulary's 48 tokens, got 49"),
        ({"code_size": 9}, "code_size is 9, but the autoencoder's is 2"),
    ],
)
def test_settings_that_make_no_head_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.calm(type="categorical_flow", **fields)


@pytest.mark.parametrize(("head", "codes"), [("categorical_flow", False), ("energy", True)])
def test_a_head_on_the_wrong_kind_of_autoencoder_is_refused(head, codes):
    autoencoder = tiny.codes_config() if codes else tiny.autoencoder_config()
    with pytest.raises(ValueError, match=r"does not fit the autoencoder.*model.autoencoder: \{type: codes"):
        CalmConfig(autoencoder_config=autoencoder, backbone_config=tiny.backbone(), head_config={"type": head})


def test_other_heads_refuse_the_direct_sampler_in_words():
    with pytest.raises(ValueError, match="sampler direct needs a head with token probabilities"):
        tiny.calm().generate(tiny.tokens(1, 4), max_new_tokens=2, sampler="direct")


def test_copies_of_a_model_have_their_own_tables():
    import copy

    model = tiny.calm(type="categorical_flow")
    twin = copy.deepcopy(model)
    assert twin.head._tables[0] is twin.get_input_embeddings()
    assert twin.head._tables[1] is twin.autoencoder
