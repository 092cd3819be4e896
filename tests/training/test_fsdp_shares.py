"""A process of a sharded run reads its own share of a checkpoint."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from calm.compat.fsdp import _share

PROCESSES = 3
SHAPES = [(7, 3), (2, 4), (1,), (9, 2)]  # with rows for some processes only, and evenly divided


class Recorded:
    """A slice of a file that notes how many rows are read."""

    def __init__(self, inner):
        self.inner, self.rows = inner, 0

    def __getitem__(self, index):
        part = self.inner[index]
        self.rows += len(part)
        return part


def _check(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    with safe_open(f"{folder}/whole.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            whole, part = file.get_tensor(name), Recorded(file.get_slice(name))
            expected = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
            share = _share(part, expected)
            assert torch.equal(share.to_local(), expected.to_local())
            assert part.rows == len(share.to_local())
            assert torch.equal(_share(whole, expected).full_tensor(), whole)
    dist.destroy_process_group()


def test_every_process_reads_its_own_rows_only(tmp_path):
    save_file({str(index): torch.randn(shape) for index, shape in enumerate(SHAPES)}, tmp_path / "whole.safetensors")
    mp.spawn(_check, (str(tmp_path),), PROCESSES)
