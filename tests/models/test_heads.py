"""What holds for every head."""

import golden
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calm import CalmForCausalLM
from calm.functional import energy_score
from calm.models.heads.activated_linear import gated_silu_linear, silu_linear
from calm.models.modeling_autoencoder import Posterior

TYPES = ["energy", "diffusion", "flow", "categorical_flow"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("head_type", TYPES)
def test_a_seed_fixes_the_sample_and_samples_differ(head_type):
    head, hidden = tiny.calm(type=head_type).head, torch.randn(3, 2, 16)
    first = head.sample(hidden, generator=seeded())
    assert first.shape == (3, 2, 8)
    assert torch.equal(first, head.sample(hidden, generator=seeded()))
    assert not torch.allclose(first, head.sample(hidden, generator=seeded(1)))


@pytest.mark.parametrize("head_type", TYPES)
def test_several_samples_of_a_state_are_those_of_the_repeated_state(head_type):
    head, hidden = tiny.calm(type=head_type).head, torch.randn(3, 16)
    several = head.sample(hidden, generator=seeded(), num_samples=5)
    repeated = head.sample(hidden.expand(5, -1, -1), generator=seeded())
    assert several.shape == (5, 3, 8)
    golden.close(several, repeated)


@pytest.mark.parametrize("head_type", ["energy", "diffusion", "flow"])  # any latent is a target
@pytest.mark.parametrize("width", [None, 24])
def test_the_loss_falls_in_training_and_samples_find_the_target(head_type, width):
    """One context whose next latent is known: every head learns to draw near it."""
    torch.manual_seed(0)
    fields = {"energy": {"condition_residual": True}, "flow": {}, "diffusion": {"clip_latent": 2.0}}[head_type]
    head = CalmForCausalLM(tiny.calm(type=head_type, hidden_size=width, **fields).config).head
    hidden = torch.randn(2, 16)
    posterior = Posterior(torch.stack([torch.full((8,), 1.5), torch.full((8,), -1.5)]), torch.full((2, 8), -3.0))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(300):
        loss = head.loss(hidden.expand(16, 2, -1), Posterior(
            posterior.mean.expand(16, 2, -1), posterior.log_std.expand(16, 2, -1)
        )).loss.mean()  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    with torch.no_grad():
        drawn = head.sample(hidden, generator=seeded(), num_samples=50).mean(0)
    torch.testing.assert_close(drawn, posterior.mean, atol=0.4, rtol=0)


@pytest.mark.parametrize("head_type", TYPES)
@pytest.mark.parametrize("patch_size", [1, 3, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_every_head_generates_at_any_temperature(head_type, patch_size, temperature):
    model = tiny.calm(patch_size, type=head_type)
    model.generation_config.eos_token_id = None
    arguments = {"max_new_tokens": 7, "temperature": temperature, "num_candidates": 6}
    ids = tiny.tokens(2, 5)
    out = model.generate(ids, generator=seeded(), **arguments)
    assert out.shape == (2, 12)
    assert torch.equal(out, model.generate(ids, generator=seeded(), **arguments))


@pytest.mark.parametrize("head_type", TYPES)
def test_a_saved_model_comes_back_with_its_head(head_type, tmp_path):
    model = tiny.calm(type=head_type, hidden_size=24)
    model.save_pretrained(tmp_path)
    loaded = CalmForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.head) is type(model.head)
    hidden = torch.randn(3, 16)
    again = loaded.head.sample(hidden, generator=seeded())
    golden.close(again, model.head.sample(hidden, generator=seeded()))


@pytest.mark.parametrize("head_type", TYPES)
def test_a_new_head_says_nothing_before_it_has_learnt(head_type):
    model = CalmForCausalLM(tiny.calm(type=head_type).config)
    layer = model.head.output_layer if head_type == "energy" else model.head.network.output_layer
    assert not layer.weight.any()
    assert not layer.bias.any()


@pytest.mark.parametrize("head_type", TYPES)
def test_heads_work_in_half_precision(head_type):
    head = tiny.calm(type=head_type).head.to(torch.bfloat16)
    hidden = torch.randn(3, 16).to(torch.bfloat16)
    assert head.sample(hidden, generator=seeded()).dtype == torch.bfloat16
    posterior = Posterior(torch.zeros(3, 8).to(torch.bfloat16), torch.zeros(3, 8).to(torch.bfloat16))
    loss = head.loss(hidden, posterior, generator=seeded()).loss
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()


def test_ddim_is_deterministic_behind_the_first_noise():
    head, hidden = tiny.calm(type="diffusion", sampler="ddim").head, torch.randn(3, 16)
    noise = torch.randn(21, 3, 8)
    other = torch.cat([noise[:1], torch.randn(20, 3, 8)])
    assert torch.equal(head.sample(hidden, noise), head.sample(hidden, other))
    assert not torch.allclose(head.sample(hidden, noise), head.sample(hidden, torch.randn(1, 3, 8)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "flow", "num_sampling_steps": 0}, "num_sampling_steps must be at least 1, got 0"),
        ({"type": "diffusion", "num_sampling_steps": 1001}, r"num_sampling_steps \(1001\) must not exceed.*\(1000\)"),
        ({"type": "flow", "solver": "heun"}, "solver"),
        ({"type": "diffusion", "sampler": "dpm"}, "sampler"),
    ],
)
def test_impossible_heads_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        tiny.calm(**fields)


def test_the_loss_of_the_energy_head_is_minus_the_energy_score():
    model = tiny.calm(2)
    hidden, noise, target_noise = torch.randn(2, 3, 16), torch.rand(4, 2, 3, 6), torch.randn(8, 2, 3, 8)
    posterior = Posterior(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    expected = energy_score(model.head.sample(hidden, noise), posterior.sample(8, target_noise))
    torch.testing.assert_close(model.head.loss(hidden, posterior, noise, target_noise).loss, -expected)


class Adapted(torch.nn.Module):
    """A low-rank adapter around a linear layer, as PEFT puts it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down = torch.nn.Linear(inner.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))

    def merged(self):
        with torch.no_grad():
            self.inner.weight += self.up.weight @ self.down.weight
        return self.inner


@pytest.mark.parametrize("head_type", TYPES)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # its new name is not in 5.17
def test_gradient_checkpointing_reaches_the_head_and_changes_nothing(head_type):
    model, ids, kept, gradients = tiny.calm(type=head_type).train(), torch.randint(2, 40, (2, 12)), [], []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        sizes = []
        hidden = torch.randn(2, 3, 16, generator=seeded()).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            posterior = Posterior(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
            loss = model.head.loss(hidden, posterior, generator=seeded()).loss.sum()
        loss.backward()
        kept.append(sum(sizes))
        gradients.append(hidden.grad)
        assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
    golden.close(gradients[1], gradients[0])
    assert kept[1] < kept[0]


class Readings(TorchDispatchMode):
    """Counts numbers that are read back from a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "fields",
    [{"type": "diffusion"}, {"type": "diffusion", "sampler": "ddim"}, {"type": "flow"}, {"type": "categorical_flow"}],
)
def test_sampling_waits_for_no_number_of_the_device(fields):
    head, readings = tiny.calm(**fields).head, Readings()
    head.sample(torch.randn(3, 16))
    with readings:
        head.sample(torch.randn(3, 16))
    assert readings.count == 0


@pytest.mark.parametrize("size", [2, 5])
def test_the_energy_loss_does_not_depend_on_how_many_rows_are_compared_at_once(size, monkeypatch):
    head, hidden = tiny.calm().head, torch.randn(5, 3, 16)
    posterior = Posterior(torch.randn(5, 3, 8), torch.full((5, 3, 8), -1.0))
    of_rows = [seeded(row) for row in range(5)]
    one_at_a_time = head.loss(hidden, posterior, generator=of_rows).loss
    monkeypatch.setattr("calm.models.heads.energy.rows_at_once", lambda *_, **__: size)
    golden.close(head.loss(hidden, posterior, generator=[seeded(row) for row in range(5)]).loss, one_at_a_time)


@pytest.mark.parametrize("head_type", TYPES)
def test_adapters_and_hooks_on_a_heads_layers_count_with_and_without_gradients(head_type):
    head, hidden, called = tiny.calm(type=head_type).head, torch.randn(3, 16), []
    layers = [name for name, module in head.named_modules() if type(module) is torch.nn.Linear]
    for name in layers:
        head.set_submodule(name, Adapted(head.get_submodule(name)))
        head.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    sample = head.sample(hidden, generator=seeded())
    assert set(called) == set(layers)
    if not sample.requires_grad:  # a sample of tokens has no gradient
        return
    sample.square().sum().backward()
    for name, parameter in head.named_parameters():
        assert not name.endswith("up.weight") or parameter.grad.any(), name
    with torch.no_grad():
        golden.close(head.sample(hidden, generator=seeded()), sample)
    for name in layers:
        head.set_submodule(name, head.get_submodule(name).merged())
    torch.testing.assert_close(head.sample(hidden, generator=seeded()), sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [silu_linear, gated_silu_linear])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0)])
def test_activated_layers_have_the_gradients_of_their_definition(function, bias, shape):
    layer = torch.nn.Linear(4, 5, bias=bias)
    x = torch.randn(*shape, 8 if function is gated_silu_linear else 4, requires_grad=True)
    if function is gated_silu_linear:
        gate, up = x.chunk(2, dim=-1)
        plain = layer(torch.nn.functional.silu(gate) * up)
    else:
        plain = layer(torch.nn.functional.silu(x))
    result = function(x, layer)
    torch.testing.assert_close(result, plain)
    wanted, factor = (x, *layer.parameters()), torch.randn_like(plain)
    for got, expected in zip(
        torch.autograd.grad((result * factor).sum(), wanted),
        torch.autograd.grad((plain * factor).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_activated_layers_compute_no_gradient_of_a_frozen_weight():
    layer, x = torch.nn.Linear(4, 5).requires_grad_(False), torch.randn(3, 4, requires_grad=True)

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.count += function.overloadpacket is torch.ops.aten.mm
            return function(*arguments, **(keywords or {}))

    result = silu_linear(x, layer)
    with Products() as products:
        result.sum().backward()
    assert products.count == 1  # the gradient of the input
    assert layer.weight.grad is None


@pytest.mark.parametrize("head_type", TYPES)
def test_a_batch_without_a_target_trains(head_type):
    model, ids = tiny.calm(type=head_type).train(), tiny.tokens(2, 4)  # one patch each: nothing follows it
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss == 0
    assert all(each.grad is None or not each.grad.any() for each in model.parameters())
