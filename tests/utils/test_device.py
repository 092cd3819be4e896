"""The precision that a model is loaded in."""

import pytest
import torch

from calm.utils.device import resolve_dtype


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_is_bfloat16_on_a_gpu_that_computes_with_it(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    assert resolve_dtype("auto", torch.device("cuda")) is expected


def test_auto_is_float32_on_a_cpu_and_as_saved_without_a_device():
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto") is None
    assert resolve_dtype("float32", torch.device("cuda")) is torch.float32


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="dtype must be one of auto, float32"):
        resolve_dtype("int8")
