"""A pretend device that counts what a real one would have to do.

Tensors on the device ``pretend`` hold processor memory, and results are those of the processor. The device is
registered with torch as a backend of its own (PrivateUse1), so code that asks for ``device.type`` takes its accelerator
path. Every operation on such tensors is recorded with the line of the project's source that caused it.

    model.to(PRETEND)
    with count() as counts:
        model(ids)
    assert counts.host_reads == 0, counts.report()
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyPrivateUse1Hook, _setup_privateuseone_for_python_backend

NAME = "pretend"
_ROOT = Path(__file__).parents[2]
_SOURCES = (str(_ROOT / "src"), str(_ROOT / "benchmarks"))

# Operations that start no kernel: they change the shape or the strides of a tensor, or only reserve memory.
_NO_LAUNCH = {
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty",
    "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unbind", "unfold", "unsqueeze", "view", "view_as_real", "_unsafe_view", "_reshape_alias", "diagonal", "lift_fresh",
    "set_", "resize_", "is_same_size", "_local_scalar_dense", "_to_copy", "copy_", "record_stream",
}  # fmt: skip
# Operations whose result has a shape that only the data determine, or whose value the host needs.
_HOST_READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal",
    "repeat_interleave", "bincount", "is_nonzero", "item",
}  # fmt: skip


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False  # so that nothing chooses the device by itself

    def is_built(self) -> bool:
        return True


class _Module:
    """What torch asks of ``torch.pretend``."""

    def device_count(self) -> int:
        return 1

    def is_available(self) -> bool:
        return False  # so that nothing chooses the device by itself

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """There is no generator of the device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())
PRETEND = torch.device(NAME, 0)


@dataclass
class Counts:
    """What code did on the pretend device, each by source line.

    ``launches`` counts kernels as eager PyTorch would start them: one per operation that computes. ``float64`` counts
    the operations among them with a float64 result, which consumer and inference GPUs compute slowly.
    ``bytes_moved`` is the sum of the sizes of all inputs and outputs of these operations.
    """

    launch_lines: Counter = field(default_factory=Counter)
    read_lines: Counter = field(default_factory=Counter)
    upload_lines: Counter = field(default_factory=Counter)
    float64_lines: Counter = field(default_factory=Counter)
    bytes_moved: int = 0

    @property
    def launches(self) -> int:
        return self.launch_lines.total()

    @property
    def host_reads(self) -> int:
        return self.read_lines.total()

    @property
    def uploads(self) -> int:
        return self.upload_lines.total()

    @property
    def float64(self) -> int:
        return self.float64_lines.total()

    def report(self, most: int = 12) -> str:
        """Return the lines with the most of each kind."""
        kinds = ("launch", "read", "upload", "float64")
        lines = [f"{self.bytes_moved / 2**20:.1f} MiB read and written by kernels"]
        for kind in kinds:
            counter: Counter = getattr(self, f"{kind}_lines")
            lines.append(f"{kind}: {counter.total()}")
            lines += [f"    {number:6d}  {line}" for line, number in counter.most_common(most)]
        return "\n".join(lines)


class PretendTensor(Tensor):
    """Processor memory that reports the device ``pretend``."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> "PretendTensor":
        result = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=PRETEND,
            requires_grad=requires_grad,
        )
        result.inner = inner
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PretendTensor({self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _meta: None, _size: Any, _stride: Any) -> "PretendTensor":
        return PretendTensor(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, None)


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts | None):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.counts)


def _outside(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Create tensors on the device while nothing is counted."""
    return _run(func, args, kwargs, None)


_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_outside, "PrivateUse1")


class _FromHostData(TorchFunctionMode):
    """``torch.tensor(data, device)`` as a tensor of the processor that is sent over, as real devices make it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            device = kwargs.pop("device")
            data = args[0] if args else kwargs["data"]
            return data.to(device) if isinstance(data, PretendTensor) else func(*args, **kwargs).to(device)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], PretendTensor):
            args = (args[0], _without_lists(args[1]), *args[2:])
        return func(*args, **kwargs)


@contextmanager
def count() -> Iterator[Counts]:
    """Count what the code inside does on the pretend device."""
    counts = Counts()
    with _FromHostData(), _Counting(counts):
        yield counts


def _run(func: Any, args: Any, kwargs: dict[str, Any], counts: Counts | None) -> Any:
    name = func.overloadpacket.__name__
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
    on_device = any(isinstance(each, PretendTensor) for each in tensors)
    device = kwargs.get("device")
    target = on_device if device is None else torch.device(device).type == NAME
    if not on_device and not target:
        return func(*args, **kwargs)
    for each in tensors:  # a real device accepts scalars of the processor and nothing else of it
        if (
            on_device
            and not isinstance(each, PretendTensor)
            and each.dim()
            and name not in ("copy_", "index", "index_put_")
        ):
            raise RuntimeError(f"{func}: tensors of the processor and of the device at once")
    inner_args, inner_kwargs = tree_map(_unwrap, (args, kwargs))
    if "device" in inner_kwargs:
        inner_kwargs["device"] = torch.device("cpu")
    inner_kwargs.pop("pin_memory", None)
    if name == "_to_copy" and on_device != target:
        inner_kwargs.pop("non_blocking", None)
    out = func(*inner_args, **inner_kwargs)
    if counts is not None:
        _record(counts, name, tensors, out, on_device, target, args)
    if name == "_local_scalar_dense":
        return out
    if func._schema.is_mutable and name.endswith("_"):
        return args[0]
    if not target and name == "_to_copy":
        return out
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda each: PretendTensor(each) if isinstance(each, Tensor) else each, out)


def _without_lists(index: Any) -> Any:
    """Return an index whose lists are tensors of the processor, as torch makes them."""
    if isinstance(index, tuple):
        return tuple(_without_lists(each) for each in index)
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list) else index


def _unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, PretendTensor) else value


def _record(
    counts: Counts, name: str, tensors: list[Tensor], out: Any, on_device: bool, target: bool, args: Any
) -> None:
    line = _source_line()
    plain = name.removesuffix("_")
    if name == "copy_":
        to, of = (isinstance(each, PretendTensor) for each in args[:2])
    else:
        to, of = target, on_device
    if name in ("_to_copy", "copy_") and to != of:
        (counts.upload_lines if to else counts.read_lines)[line] += 1
        return
    if name in ("index", "index_put_"):
        indices = [each for each in args[1] if each is not None]
        # A mask of truth values is turned into positions, whose number the host must know; lists are sent over.
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            counts.read_lines[line] += 1
        if sent := sum(not isinstance(each, PretendTensor) for each in indices):
            counts.upload_lines[line] += sent
    if plain in _HOST_READS:
        counts.read_lines[line] += 1
        if plain in ("_local_scalar_dense", "item"):
            return
    if plain in _NO_LAUNCH and name not in ("_to_copy", "copy_"):
        return
    counts.launch_lines[line] += 1
    outputs = [each for each in tree_iter(out) if isinstance(each, Tensor)]
    if any(each.dtype == torch.float64 for each in outputs):
        counts.float64_lines[line] += 1
    counts.bytes_moved += sum(_nbytes(each) for each in [*tensors, *outputs])


def _nbytes(tensor: Tensor) -> int:
    # An expanded dimension is read once.
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * tensor.element_size()


def _source_line() -> str:
    """Return the innermost line of the project on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_SOURCES):
            return f"{Path(name).relative_to(_ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
