"""A recorded decode step: what replaying it needs to be true, shown without a GPU."""

import copy
import gc
import inspect
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import seeded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import memory
from config import PRESETS
from engine import distributed, graph, samplers
from engine.graph import RecordedStep
from engine.shared_prompt import SharedCache
from rollout import build_prompt, new_response, sample


def numbers_frozen(made: list):
    """A recorder as CUDA's is: it keeps the kernels, the places and every number of Python's.

    It runs what it records, which CUDA's does not: the lengths are put back.
    """

    def recorder(model, device, wanted):
        def record(work):
            cache = inspect.getclosurevars(work).nonlocals["step"].__self__.cache
            lengths = cache.lengths.clone()
            kernels = make_fx(work)()
            output = kernels()
            cache.lengths.copy_(lengths)
            made.append(kernels)
            return (lambda: output.copy_(kernels())), output

        return record if wanted else None

    return recorder


def test_a_recorded_step_writes_the_same_responses(monkeypatch, policy, kb, mixed, cfg):
    """Numbers that were recorded do not change any more: none may be needed that does. And a
    recording serves for many tokens.
    """
    cfg = replace(cfg, group_size=3)
    plain = sample(policy, kb, mixed, replace(cfg, graph=False), seeded(0))
    made, steps = [], []
    step = RecordedStep.__call__

    def counted(self, *arguments):
        steps.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(samplers, "recorder", numbers_frozen(made))
    monkeypatch.setattr(RecordedStep, "__call__", counted)
    again = sample(policy, kb, mixed, cfg, seeded(0))
    assert len(made) > 3  # turns, rows that leave, blocks that are full
    assert len(steps) > 2 * graph.EAGER_CALLS * len(made)
    for mine, other in zip(again, plain):
        assert mine.token_ids.tolist() == other.token_ids.tolist()
        torch.testing.assert_close(mine.logprobs, other.logprobs, rtol=0, atol=1e-4)


def test_a_kind_of_step_is_recorded_when_it_has_come_a_few_times(monkeypatch):
    monkeypatch.setattr(graph, "EAGER_CALLS", 2)
    ran = []

    def step(x):
        ran.append(int(x))
        return 2 * x

    def record(work):
        ran.append("recorded")
        output = torch.zeros(())
        return (lambda: output.copy_(2 * recorded.inputs[0])), output

    recorded = RecordedStep(record)
    calls = list(zip("aaaabbba", torch.arange(8.0)))
    assert [recorded(step, kind, x).item() for kind, x in calls] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert ran == [0, 1, "recorded", 4, 5, "recorded", 7]
    ran.clear()
    never = RecordedStep(None)
    assert [never(step, kind, x).item() for kind, x in calls] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert ran == list(range(8))


def test_what_sampling_needed_is_freed_when_it_ends(monkeypatch, policy, kb, mixed, cfg):
    """At once, not when Python looks for cycles: the update needs the memory."""
    caches = []

    def watched(*arguments):
        cache = SharedCache(*arguments)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(samplers, "SharedCache", watched)
    monkeypatch.setattr(samplers, "recorder", numbers_frozen([]))
    gc.disable()
    try:
        sample(policy, kb, mixed[:2], replace(cfg, group_size=2), seeded(0))
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


def test_nothing_is_recorded_without_a_gpu_or_where_it_is_not_wanted(policy):
    assert graph.recorder(policy.model, torch.device("cpu"), wanted=True) is None
    assert graph.recorder(policy.model, torch.device("cuda"), wanted=False) is None


def test_a_step_that_waits_for_other_ranks_is_not_recorded():
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        model = memory.fake_policy(PRESETS["tiny"], layers=1).model
        assert distributed.gathers(model)
        with distributed.gathered(model):
            assert not distributed.gathers(model)  # every rank has whole weights
        assert distributed.gathers(model)
    finally:
        dist.destroy_process_group()


class StaysOnTheDevice(TorchDispatchMode):
    """Fails where a number of the device is asked for, or a tensor comes from the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name != "aten::_local_scalar_dense", "a number was asked for"
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "cuda", f"{name} uses a tensor of the CPU"
        return out


@pytest.fixture
def on_a_fake_gpu(policy, mixed, cfg):
    """A sampler that has read its prompts and one token, then moved to a GPU without numbers, in
    bfloat16."""
    prompt = build_prompt(policy, mixed[0], cfg)
    responses = [new_response(mixed[0], prompt) for _ in range(4)]
    sampler = samplers.SharedPromptSampler(policy, responses, cfg, ())
    sampler.read_prompts()
    sampler.cache.make_room(1)
    step = torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long), torch.ones(4).bool()
    with torch.no_grad():
        sampler.compute_one(*step)
    mode = FakeTensorMode()

    def moved(x):
        if not isinstance(x, torch.Tensor):
            return x
        fake = mode.from_tensor(x.detach())
        with mode:
            return fake.to("cuda", torch.bfloat16 if x.dtype == torch.float32 else x.dtype)

    model = copy.deepcopy(policy.model)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                table[name] = moved(tensor)
    sampler.policy = replace(policy, model=model)
    cache = sampler.cache
    for name, value in vars(cache).items():
        setattr(cache, name, moved(value))
    cache.prompts = [tuple(map(moved, pair)) for pair in cache.prompts]
    cache.own = [tuple(map(moved, pair)) for pair in cache.own]
    return sampler, [moved(x) for x in step], mode


def test_a_step_neither_asks_the_gpu_nor_brings_it_anything(on_a_fake_gpu):
    """Either would end a recording: "operation not permitted when stream is capturing"."""
    sampler, step, mode = on_a_fake_gpu
    sampler.cache.make_room(1)
    with mode, StaysOnTheDevice(), torch.no_grad():
        logits = sampler.compute_one(*step)
    assert logits.shape == (4, len(sampler.policy.bias))
    assert logits.device.type == "cuda" and logits.dtype == torch.bfloat16
