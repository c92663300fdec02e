"""Ranks: what is needed to make N processes compute what one would. Without torchrun there is one rank, and no cost.

Sharding is FSDP2: every decoder layer and vision block is a unit with its own all-gather, the root holds the rest. Master
weights and reductions are float32, compute is in `dtype`. For sampling, each rank gathers whole weights once and then
works alone: generation takes a different number of steps on every rank, and collectives inside it would wait for ever.
"""
from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def reduced(value: float, device, op=dist.ReduceOp.SUM) -> float:
    """A number, summed (or otherwise reduced) over ranks."""
    if dist.is_initialized():
        tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
        dist.all_reduce(tensor, op)
        return tensor.item()
    return float(value)


def shard(model, dtype: torch.dtype):
    """FSDP2, a unit for every decoder layer and vision block, the root for the rest."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    register_fsdp_forward_method(model, "policy_logits")
    return model


@contextmanager
def gathered(model):
    """Whole weights on every rank, so that each can sample at its own pace, without collectives."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def start():
    """Join the process group that torchrun describes, if it does."""
    if "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=1))


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
