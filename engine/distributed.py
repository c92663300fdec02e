"""Ranks: what makes N processes compute what one would.

Without torchrun, on a CPU, there is one rank, and no cost.

**Sharding** is FSDP2: every decoder layer and vision block is a unit with its own all-gather, the
root holds the rest. Master weights and reductions are float32, compute is in `dtype`. On several
nodes weights are sharded within a node and copied across nodes (hybrid). With adapters the frozen
model is copied, and only the adapters' gradients are averaged.

**Sampling** takes a different number of forward passes on every rank, and collectives inside it
would wait for ever. Either each rank gathers whole weights once and then works alone (`gathered`),
or all ranks run in lockstep, layer by layer, and those that have finished go on with dummy passes
while others have responses left (`make_any_left`).
"""

import os
import signal
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import MethodType

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
from torch.distributed.tensor import DTensor


class Preempted(Exception):
    """This rank must stop now: after a signal, or because another rank in lockstep cannot go on."""


class AnotherRankFailed(Exception):
    """Something went wrong elsewhere; that rank says what."""


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduced(value: float, device, op=dist.ReduceOp.SUM) -> float:
    """A number, summed (or otherwise reduced) over ranks."""
    if world()[1] == 1:
        return float(value)
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.item()


def all_objects(items: list) -> list:
    """The ranks' lists, one after another."""
    ranks = world()[1]
    if ranks == 1:
        return items
    parts = [None] * ranks
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def barrier():
    if world()[1] > 1:
        dist.barrier()


# -------------------------------------------------------------------------------------- sharding


def device_mesh(device: str):
    """One dimension over all ranks; on several nodes two, (nodes, ranks of a node)."""
    ranks = world()[1]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    kind = device.split(":")[0]
    if local < ranks:
        shape = (ranks // local, local)
        return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))


def shard(model, dtype: torch.dtype, device: str = "cpu", offload: bool = False):
    """FSDP2: a unit for every decoder layer and vision block, the root for the rest.

    Parameters may still be without memory. Returns the model.
    """
    master = next(model.parameters()).dtype
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == master else dtype,
        reduce_dtype=master,
        # else rotary angles would be rounded in a forward pass, but not where it is computed again
        cast_forward_inputs=False,
    )
    options = {
        "mesh": device_mesh(device),
        "mp_policy": precision,
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def gathers(model) -> bool:
    """Whether a forward pass gathers weights: of a sharded model, outside `gathered`."""
    return is_sharded(model) and bool(model._forward_pre_hooks)


def call_sharded(model, function, *args, **kwargs):
    """function(model, …), for what uses a model's parts without calling its `forward`.

    FSDP gathers the root's weights (embeddings, vocabulary projection) in hooks around `forward`.
    On a sharded model the function therefore has to be a method with the same hooks: the only thing
    that is ever hung on a model.
    """
    if not is_sharded(model):
        return function(model, *args, **kwargs)
    name = function.__name__
    if not hasattr(model, name):
        setattr(model, name, MethodType(function, model))
        register_fsdp_forward_method(model, name)
    return getattr(model, name)(*args, **kwargs)


@contextmanager
def gathered(model, whole: bool = True):
    """Whole weights on every rank, so that each can sample at its own pace, without collectives.

    whole=False leaves them sharded: every forward pass gathers its layers and needs all ranks.
    """
    units = [module for module in model.modules() if is_sharded(module)] if whole else []
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    # FSDP's hooks have nothing to gather now, and would take a fifth of a token's host time
    hooks = [(unit, unit._forward_pre_hooks, unit._forward_hooks) for unit in units]
    for unit, before, after in hooks:
        unit._forward_pre_hooks, unit._forward_hooks = type(before)(), type(after)()
    try:
        yield
    finally:
        for unit, before, after in hooks:
            unit._forward_pre_hooks, unit._forward_hooks = before, after
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def clip_gradients(model, max_norm: float) -> float:
    """Scale the global gradient to at most max_norm; returns its norm before.

    Replicated adapters' gradients are averaged over ranks first; sharded ones already are.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    ranks = world()[1]
    if ranks > 1 and not isinstance(parameters[0], DTensor):
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.item()


# ------------------------------------------------------------------------- going on, and stopping

STOP_REQUESTS = []  # numbers of the signals received


def alone(left: bool) -> bool:
    """The `any_left` of one process: it answers for itself."""
    return left


def make_any_left(policy, whole: bool = True):
    """The function `any_left(left)` that samplers ask before a forward pass others may not need.

    left: whether this rank has responses left. With whole weights a rank answers for itself. In
    lockstep the answer is True while any rank has something left; a rank that says None cannot go
    on, and all stop together. Raises Preempted after a signal.
    """
    sharded = any(is_sharded(module) for module in policy.model.modules())
    lockstep = sharded and not whole

    def any_left(left: bool | None) -> bool:
        stop = bool(STOP_REQUESTS)
        if not lockstep:
            if stop:
                raise Preempted
            return bool(left)
        if reduced(stop or left is None, policy.device):
            raise Preempted
        return reduced(left, policy.device) > 0

    return any_left


@contextmanager
def all_or_none(any_left, device, *problems):
    """What is done inside succeeds on all ranks, or raises on all of them.

    problems: the exceptions that are expected. A rank raises its own; the others raise Preempted,
    or AnotherRankFailed.
    """
    problem = None
    try:
        yield
    except (*problems, Preempted) as error:
        problem = error
        if not isinstance(error, Preempted):  # that one has reached all ranks in lockstep already
            with suppress(Preempted):
                any_left(None)  # ranks in lockstep with this one stop
    preempted = isinstance(problem, Preempted)
    failed = problem is not None and not preempted
    if reduced(failed, device):
        raise problem if failed else AnotherRankFailed
    if reduced(preempted, device):
        raise Preempted


def local_device() -> str:
    """This process's GPU, where there are GPUs."""
    if torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    return "cpu"


def share_cores():
    """Give each rank of a node its share of the cores. torchrun gives each one, with which a search
    in an index in the CPU's memory takes seconds. A number in OMP_NUM_THREADS above 1 stays."""
    if "WORLD_SIZE" not in os.environ or int(os.environ.get("OMP_NUM_THREADS", 1)) > 1:
        return
    import faiss  # its wheel brings an OpenMP of its own

    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = int(os.environ.get("SLURM_CPUS_PER_TASK", max(1, cores)))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def start(patience: timedelta = timedelta(minutes=20)):
    """Join the process group that torchrun describes, if it does.

    A lone GPU makes a group of one, for mixed precision. patience: for how long a rank waits for
    the others.
    """
    share_cores()
    # Caches grow: without this each new size would need a piece of memory of its own.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # gloo beside nccl: for what is offloaded to the CPU
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=patience)
    elif torch.cuda.is_available():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def catch_signals():
    """From now on SIGTERM, SIGHUP (a closed terminal) and Ctrl-C are requests to stop at the next
    moment at which nothing is lost. A second Ctrl-C stops at once. What was ignored stays ignored:
    SIGHUP under nohup."""

    def request(number, frame):
        if number == signal.SIGINT and number in STOP_REQUESTS:
            raise KeyboardInterrupt
        STOP_REQUESTS.append(number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, request)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
