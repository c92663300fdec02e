"""Ranks: what is needed to make N processes compute what one would. Without torchrun on a CPU there is one rank, and no cost.

**Sharding** is FSDP2: every decoder layer and vision block is a unit with its own all-gather, the root holds the rest.
Master weights and reductions are float32, compute is in `dtype`. On several nodes weights are sharded within a node and
copied across nodes (hybrid): only gradients cross the slow network. With adapters the frozen model is copied instead,
and only the adapters' gradients are averaged.

**Loading.** The model is made without memory; each rank then reads its own part of each tensor from the memory-mapped
files. No rank, and no node's memory, ever holds more than one copy.

**Sampling** takes a different number of steps on every rank, and collectives inside it would wait for ever. Either each
rank gathers whole weights once and then works alone (`gathered`), or all run in lockstep, layer by layer, those that have
finished going through the motions (`going_on`).
"""

import json
import os
import re
import signal
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)


class Preempted(Exception):
    """The cluster wants the machine back (SIGTERM)."""


class AnotherRankFailed(Exception):
    """Something went wrong elsewhere; that rank says what."""


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def reduced(value: float, device, op=dist.ReduceOp.SUM) -> float:
    """A number, summed (or otherwise reduced) over ranks."""
    if world()[1] > 1:
        tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
        dist.all_reduce(tensor, op)
        return tensor.item()
    return float(value)


def all_objects(items: list) -> list:
    """The ranks' lists, one after another."""
    if world()[1] == 1:
        return items
    parts = [None] * world()[1]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def barrier():
    if world()[1] > 1:
        dist.barrier()


# ------------------------------------------------------------------------------------------- sharding


def device_mesh(device: str):
    """One dimension over all ranks; on several nodes two, (nodes, ranks of a node)."""
    ranks = world()[1]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    shape, names = (
        ((ranks // local, local), ("replicate", "shard"))
        if local < ranks
        else ((ranks,), ("shard",))
    )
    return init_device_mesh(device.split(":")[0], shape, mesh_dim_names=names)


def shard(model, dtype: torch.dtype, device: str = "cpu", offload: bool = False):
    """FSDP2, a unit for every decoder layer and vision block, the root for the rest. Parameters may still be without memory."""
    master = next(model.parameters()).dtype
    options = {
        "mesh": device_mesh(device),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == master else dtype, reduce_dtype=master
        ),
    }
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def shard_methods(model):
    """What is called on a sharded model besides `forward`; call it once they are attached."""
    for name in ("policy_logprobs", "blank_image"):
        register_fsdp_forward_method(model, name)
    return model


def parameter_name(key: str) -> str:
    """A tensor's name in a released checkpoint, to its name in the model.

    >>> parameter_name("visual.merger.ln_q.weight"), parameter_name("model.norm.weight"), parameter_name("lm_head.weight")
    ('model.visual.merger.ln_q.weight', 'model.language_model.norm.weight', 'lm_head.weight')
    """
    return re.sub(
        r"^model\.(?!visual\.|language_model\.)",
        "model.language_model.",
        re.sub(r"^visual\.", "model.visual.", key),
    )


@torch.no_grad()
def fill(model, name: str, device: str, offload: bool = False):
    """Give a sharded model without memory its weights; each rank reads only its own rows. Raises OSError for missing ones."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = (
        Path(name)
        if Path(name).is_dir()
        else Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    )
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    opened = cache(lambda file: safe_open(folder / file, "pt"))
    places = {parameter_name(key): (file, key) for file in files for key in opened(file).keys()}
    buffers = {path: buffer.to(device) for path, buffer in model.named_buffers()}
    model.to_empty(device="cpu" if offload else device)
    for path, buffer in buffers.items():
        owner, _, last = path.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer
    for path, parameter in model.named_parameters():
        if path not in places:
            raise OSError(f"{folder} does not hold {path}")
        file, key = places[path]
        rows, mesh = opened(file).get_slice(key), parameter.device_mesh
        if tuple(rows.get_shape()) != tuple(parameter.shape):
            raise OSError(
                f"{path} is {tuple(rows.get_shape())} in {folder}; its config.json says {tuple(parameter.shape)}"
            )
        size = -(-parameter.shape[0] // mesh.size(mesh.ndim - 1))
        mine = parameter.to_local()
        start = min(mesh.get_local_rank(mesh.ndim - 1) * size, parameter.shape[0])
        mine.copy_(rows[start : start + len(mine)])


@contextmanager
def gathered(model, whole: bool = True):
    """Whole weights on every rank, so that each can sample at its own pace, without collectives.

    whole=False leaves them sharded: every forward pass gathers its layers and needs all ranks.
    """
    units = (
        [module for module in model.modules() if isinstance(module, FSDPModule)] if whole else []
    )
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


# ------------------------------------------------------------------------------------- going on together

STOP = []  # a signal was received


def going_on(model, whole: bool = True):
    """The `go_on` of `rollout.sample`: asked before every forward pass whether rows are left. Raises Preempted after SIGTERM.

    With whole weights a rank answers for itself. In lockstep it goes on while any rank has something left, and all stop
    together, also when one of them says None: it cannot go on.
    """
    device = model.sampling_bias.device
    lockstep = not whole and any(isinstance(module, FSDPModule) for module in model.modules())

    def go_on(left: bool | None) -> bool:
        stop = bool(STOP) or lockstep and left is None
        if reduced(stop, device) if lockstep else stop:
            raise Preempted
        return reduced(left, device) > 0 if lockstep else bool(left)

    return go_on


def agree(problem: Exception | None, device):
    """Raise on all ranks when something was caught on one: there what it was, elsewhere Preempted or AnotherRankFailed."""
    failed = reduced(problem is not None and not isinstance(problem, Preempted), device)
    if failed:
        raise AnotherRankFailed if problem is None or isinstance(problem, Preempted) else problem
    if reduced(problem is not None, device):
        raise Preempted


def start():
    """Join the process group that torchrun describes, if it does; a lone GPU makes a group of one, for mixed precision."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = (
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    )  # gloo for what is offloaded
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    elif torch.cuda.is_available():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def catch_sigterm():
    """From now on SIGTERM is a request to stop at the next moment at which nothing is lost."""
    signal.signal(signal.SIGTERM, lambda *_: STOP.append(True))


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
