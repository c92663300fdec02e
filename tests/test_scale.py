"""At scale: N ranks make the step of one, memory stays bounded, what is not finite is skipped, a signal loses nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, WARMSTART
from torch.utils._python_dispatch import TorchDispatchMode

import distributed
import model as model_module
import train as train_module
from config import PRESETS
from data import Question
from engine import checkpoint, cost
from engine.packing import clip_gradients, micro_batches, update
from model import load_policy, pack, token_logprobs
from rollout import sample

CFG = replace(
    PRESETS["tiny"], group_size=4, updates_per_step=1, micro_tokens=1500, lr=0.05, warmup_steps=0
)
TEXT_ONLY = Question(
    "text",
    "What is the capital of Chad?",
    (),
    "N'Djamena",
    ["N'Djamena"],
    "String",
    "Bridge",
    None,
    None,
)


@pytest.fixture(scope="module")
def groups(policy, kb, mixed):
    """Eight groups with pictures and one without, their rewards drawn at random so that every one has a gradient."""
    asked = mixed + [TEXT_ONLY]
    responses = sample(*policy, kb, asked, CFG, torch.Generator().manual_seed(0))
    totals = torch.randn(
        len(asked), 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return [(responses[4 * i : 4 * i + 4], totals[i]) for i in range(len(asked))]


# ------------------------------------------------------------------------------------- N ranks are one


def three_steps(share, spare, lora=0):
    """[loss, gradient norm] of three SGD steps in float64, and the weights after them."""
    torch.manual_seed(0)
    sharded = dist.is_initialized() and not lora

    def place(model, name):
        distributed.fill(distributed.shard(model, torch.float64), name, "cpu")

    model, _ = load_policy(
        WARMSTART, torch.float64, "sdpa", "cpu", place if sharded else None, lora
    )
    if sharded:
        distributed.shard_methods(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            if "lora_B" in name:
                p.fill_(0.01)  # zeros would hide the gradient of A
    before = {name: full(p).clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    stats = [update(model, optimizer, share, CFG, step, spare) for step in range(3)]
    return [[s["loss"], s["grad_norm"], s["entropy"]] for s in stats], {
        name: full(p) - before[name] for name, p in trained.items()
    }


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def deal(groups, rank, ranks):
    """Unequal shares; with four ranks one gets nothing, and another only the question without a picture."""
    if ranks == 2:
        return groups[:7] if rank == 0 else groups[7:]
    return [groups[:5], [], groups[5:8], groups[8:]][rank]


def rank_main(rank, ranks, port, groups, questions, kb_folder, folder):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    result = {"steps": three_steps(deal(groups, rank, ranks), groups[0][0][0])}
    if ranks == 4:  # as two nodes of two
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        result["hybrid"] = three_steps(deal(groups, rank, ranks), groups[0][0][0])
    if ranks == 2:
        result["lora"] = three_steps(deal(groups, rank, ranks), groups[0][0][0], lora=2)
        result["lockstep"] = sampled_in_lockstep(rank, questions, kb_folder)
    if rank == 0:
        torch.save(result, folder / f"{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


def greedy(model, processor, kb, questions, go_on=bool):
    cfg = replace(CFG, group_size=1, temperature=0.0)
    return [t.token_ids.tolist() for t in sample(model, processor, kb, questions, cfg, go_on=go_on)]


def sampled_in_lockstep(rank, questions, kb_folder):
    """Rank 0 has one question without a picture, rank 1 all the others; no rank ever holds whole weights."""
    from retrieval import KnowledgeBase

    def place(model, name):
        distributed.fill(distributed.shard(model, torch.float32), name, "cpu")

    model, processor = load_policy(WARMSTART, torch.float32, "sdpa", "cpu", place)
    distributed.shard_methods(model).eval()
    kb = KnowledgeBase.open(kb_folder)
    mine = greedy(
        model,
        processor,
        kb,
        questions[-1:] if rank == 0 else questions[:-1],
        distributed.going_on(model, whole=False),
    )
    parts = [None, None]
    dist.all_gather_object(parts, mine)
    return parts[1] + parts[0]


@pytest.fixture(scope="module")
def spawned(groups, mixed, kb_folder, tmp_path_factory):
    folder, asked = tmp_path_factory.mktemp("ranks"), mixed[:5] + [TEXT_ONLY]
    mp.set_forkserver_preload([__name__])  # what takes seconds to import is imported once
    for ranks in (2, 4):
        mp.start_processes(
            rank_main,
            (ranks, 29630 + ranks, groups, asked, kb_folder, folder),
            nprocs=ranks,
            start_method="forkserver",
        )
    return {ranks: torch.load(folder / f"{ranks}.pt", weights_only=True) for ranks in (2, 4)}, asked


def assert_same(one, many, rounding=1e-5):
    for mine, theirs in zip(one[0], many[0]):
        assert mine == pytest.approx(theirs, rel=1e-5)
    size = max(change.abs().max() for change in one[1].values())
    assert size > 0 and one[1].keys() == many[1].keys()
    for name, change in one[1].items():
        assert (change - many[1][name]).abs().max() <= rounding * size, name


def test_two_four_and_hybrid_ranks_make_the_steps_of_one(spawned, groups):
    """The same losses, gradient norms and weights, with idle ranks, unequal lengths and a question without a picture."""
    one = three_steps(groups, groups[0][0][0])
    for result in (spawned[0][2]["steps"], spawned[0][4]["steps"], spawned[0][4]["hybrid"]):
        assert_same(one, result)


def test_replicated_adapters_make_the_steps_of_one(spawned, groups):
    assert_same(
        three_steps(groups, groups[0][0][0], lora=2), spawned[0][2]["lora"], rounding=1e-4
    )  # adapters are float32


def test_sampling_in_lockstep_is_sampling(spawned, policy, kb):
    result, asked = spawned
    assert result[2]["lockstep"] == greedy(*policy, kb, asked)


# ------------------------------------------------------------------------------------- memory


def test_micro_batches_keep_their_budget(groups):
    responses = [(t, 0.0) for group, _ in groups for t in group]
    for share in (True, False):
        batches = micro_batches(responses, 1500, share_prompt=share)
        assert [id(t) for batch in batches for t, _ in batch] == [id(t) for t, _ in responses]
        sizes = [
            pack([t for t, _ in batch], "cpu", share)[0]["input_ids"].numel() for batch in batches
        ]
        assert all(size <= 1500 for size in sizes) and len(sizes) < len(responses)
    assert [len(batch) for batch in micro_batches(responses, 1)] == [1] * len(responses)


def test_a_shared_prompt_changes_nothing(groups):
    """Loss and gradients with each prompt computed once, and once a response."""
    responses, results = [t for group, _ in groups for t in group], []
    weights = torch.linspace(-1, 1, len(responses), dtype=torch.float64)
    for share in (True, False):
        model, _ = load_policy(WARMSTART, torch.float64)
        logprobs, _ = token_logprobs(model, responses, share_prompt=share)
        loss = (logprobs.sum(1) * weights).sum()
        loss.backward()
        results.append(
            (
                loss.detach(),
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            )
        )
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    assert results[0][1].keys() == results[1][1].keys() and len(results[0][1]) > 60
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most elements of any tensor whose last dimension is the vocabulary, the projection's own weight aside."""

    def __init__(self, weight):
        super().__init__()
        (self.vocabulary, self.hidden), self.elements = weight.shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dim() > 1
                and tensor.shape[-1] == self.vocabulary
                and tensor.shape[0] != self.hidden
            ):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_vocabulary_scores_exceeds_its_bound(groups, monkeypatch):
    """Forward and backward; and cut into pieces, loss and gradients are what they are in one piece."""
    responses, results = [t for group, _ in groups for t in group], []
    tokens = sum(int(t.policy_mask.sum()) for t in responses)
    for bound in (2**18, 2**40):
        monkeypatch.setattr(model_module, "LOGITS", bound)
        model, _ = load_policy(WARMSTART, torch.float64)
        with Largest(model.lm_head.weight) as largest:
            logprobs, entropy = token_logprobs(model, responses)
            (logprobs.sum() + 0 * entropy.sum()).backward()
        results.append((logprobs.detach(), entropy.detach(), model.lm_head.weight.grad))
        assert 0 < largest.elements <= bound
        if bound == 2**40:
            assert (
                largest.elements == tokens * len(model.sampling_bias) > 2**20
            )  # without pieces it would be much
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


# ------------------------------------------------------------------------------------- numbers that are none


def test_a_non_finite_step_is_skipped_counted_and_kept(groups, tmp_path):
    model, _ = load_policy(WARMSTART, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    broken = [(responses, totals * torch.nan) for responses, totals in groups[:2]]
    stats = update(model, optimizer, broken, replace(CFG, out=tmp_path), step=6)
    assert (
        stats["updates_skipped"] == 1
        and not optimizer.state
        and all(torch.equal(before[name], p) for name, p in model.named_parameters())
    )
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "bad-step-000007-0-rank0.safetensors")
    assert (
        torch.equal(kept["3.token_ids"], broken[0][0][3].token_ids)
        and kept["advantages"].isnan().all()
    )
    good = update(
        model, optimizer, groups[:2], replace(CFG, out=tmp_path), step=7
    )  # and it goes on
    assert good["updates_skipped"] == 0 and good["grad_norm"] > 0


def test_gradients_are_clipped(policy, groups):
    model, _ = load_policy(WARMSTART, torch.float32)
    token_logprobs(model, groups[0][0])[0].sum().backward()
    norm = clip_gradients(model, 0.5)
    assert norm > 0.5 and clip_gradients(model, 10.0) == pytest.approx(0.5, rel=1e-4)


def test_recomputed_logprobs_are_weighted_by_a_truncated_ratio(groups, policy):
    """What the rollout said is changed on purpose; the recomputed log-probs must replace it, their ratio be capped."""
    responses = [
        replace(t, logprobs=t.logprobs + torch.where(t.policy_mask, 0.1 if i % 2 else -3.0, 0.0))
        for i, t in enumerate(groups[0][0])
    ]
    cfg = replace(CFG, recompute_logprobs=True, max_rollout_ratio=2.0)
    model, _ = load_policy(WARMSTART, torch.float32)
    stats = update(
        model, torch.optim.SGD(model.parameters(), lr=0.0), [(responses, groups[0][1])], cfg
    )
    assert stats["logprob_diff_max"] == pytest.approx(3.0, abs=1e-3) and stats["clip_fraction"] == 0
    for i, (t, original) in enumerate(zip(responses, groups[0][0])):
        torch.testing.assert_close(t.logprobs, original.logprobs, rtol=0, atol=1e-3)
        assert t.weights[t.policy_mask].tolist() == pytest.approx(
            [0.9048 if i % 2 else 2.0] * int(t.policy_mask.sum()), abs=1e-3
        )
        assert (t.weights[~t.policy_mask] == 1).all()
        t.weights = None


# ------------------------------------------------------------------------------------- runs

SMALL = dict(
    questions_per_step=4,
    group_size=4,
    eval_questions=4,
    eval_every=2,
    save_every=2,
    max_refills=1,
    steps=4,
)


def train_here(kb_folder, data_folder, out, **options):
    """A run in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_module.train(
            replace(PRESETS["tiny"], kb=kb_folder, data=data_folder, out=out, **SMALL | options)
        )
    finally:
        torch.set_num_threads(threads)


def figures(out):
    timed = {
        "seconds_rollout",
        "seconds_search",
        "seconds_train",
        "tokens_per_second",
        "eval_seconds",
    }
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed}
        for line in open(out / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(kb_folder, data_folder, tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "runs" / "tiny"
    train_here(kb_folder, data_folder, out, tensorboard=True)
    return out


def test_sigterm_saves_and_the_resumed_run_is_the_same(whole, kb_folder, data_folder, tmp_path):
    out, flags = (
        tmp_path / "cut",
        [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()],
    )
    process = subprocess.Popen(
        [
            sys.executable,
            "train.py",
            "tiny",
            "--kb",
            kb_folder,
            "--data",
            data_folder,
            "--out",
            out,
            *flags,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    while (
        not (out / "metrics.jsonl").exists()
        or '"reward_mean"' not in (out / "metrics.jsonl").read_text()
    ):
        assert process.poll() is None and time.sleep(0.02) is None
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "stopped by SIGTERM" in output, errors[-2000:]
    saved = json.loads((out / "latest" / "trainer.json").read_text())["step"]
    assert 1 <= saved < 4 and max(r["step"] for r in figures(out)) == saved
    train_here(kb_folder, data_folder, out, resume=True)
    expected = figures(whole)
    assert figures(out) == expected and [r["step"] for r in expected if "reward_mean" in r] == [
        1,
        2,
        3,
        4,
    ]
    assert [r["step"] for r in expected if "eval_n" in r] == [0, 2, 4] and (
        whole / "curves.png"
    ).stat().st_size > 10_000
    assert {
        "eval_sampled_overall",
        "eval_greedy_overall",
        "eval_greedy_compare",
        "eval_format_rate",
    } <= set(expected[0])
    assert all(r["logprob_diff_max"] < 1e-3 for r in expected if "reward_mean" in r)


def test_a_damaged_checkpoint_is_refused(whole, tmp_path):
    assert sorted(p.name for p in whole.glob("step-*")) == ["step-000002", "step-000004"]
    assert checkpoint.verify(whole / "latest")["step"] == 4
    for name, change in (
        ("optimizer-0.safetensors", -1),
        ("model.safetensors", -5),
        ("surplus-0.safetensors", None),
    ):
        shutil.copytree(whole / "latest", tmp_path / name)
        damaged = tmp_path / name / name
        content = bytearray(damaged.read_bytes())
        if change:
            content[change] ^= 1  # one flipped bit
        damaged.write_bytes(content if change else content[:-1])
        with pytest.raises(ValueError, match=f"{name} is not what was written"):
            checkpoint.verify(tmp_path / name)
    (tmp_path / name / "trainer.json").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint.verify(tmp_path / name)


def test_adapters_are_trained_saved_resumed_and_merged(kb_folder, data_folder, tmp_path):
    options = dict(lora_rank=4, freeze_vision=True, lr=1e-3, steps=3)
    train_here(kb_folder, data_folder, tmp_path / "whole", **options)
    latest = tmp_path / "whole" / "latest"
    (tmp_path / "cut").mkdir()  # the run as it was after its second step
    shutil.copytree(tmp_path / "whole" / "step-000002", tmp_path / "cut" / "step-000002")
    (tmp_path / "cut" / "latest").symlink_to("step-000002")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut")
    train_here(kb_folder, data_folder, tmp_path / "cut", resume=True, **options)
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
    assert (latest / "adapter_model.safetensors").exists() and not list(
        latest.glob("model*.safetensors")
    )
    checkpoint.merge(checkpoint.Merge(latest, tmp_path / "merged"))
    ids = torch.arange(40)[None] + 300
    base, adapted, merged = (
        load_policy(name, torch.float32)[0].eval()(input_ids=ids).logits
        for name in (WARMSTART, latest, tmp_path / "merged")
    )
    assert (adapted - base).abs().max() > 10 * (
        adapted - merged
    ).abs().max()  # merged weights are float16, as the base's are


def test_a_checkpoint_is_a_model_by_the_readmes_three_lines(whole, monkeypatch):
    lines = re.search(
        r"```python\n(from transformers.*?)```", (ROOT / "docs/commands.md").read_text(), re.DOTALL
    ).group(1)
    monkeypatch.chdir(whole.parent.parent)
    scope = {}
    exec(lines, scope)
    assert (
        type(scope["model"]).__name__ == "Qwen2_5_VLForConditionalGeneration"
        and type(scope["processor"]).__name__ == "Qwen2_5_VLProcessor"
    )
    assert list((whole / "tensorboard").glob("events.*"))


# ------------------------------------------------------------------------------------- the plan


def test_the_plan_of_the_paper_fits_eight_gpus_and_not_one(capsys):
    cost.show(PRESETS["paper"])
    text = capsys.readouterr().out
    assert "8,292,166,656 parameters" in text and "2,048 responses" in text and "unmeasured" in text
    with pytest.raises(ValueError, match="cannot fit.*--offload"):
        cost.show(replace(PRESETS["paper"], plan_gpus=1))
    cost.show(replace(PRESETS["small"], plan_gpus=1, plan_gpu_gb=24))


def test_the_plans_flops_are_those_of_pytorchs_counter(groups):
    from torch.utils.flop_counter import FlopCounterMode

    model, _ = load_policy(WARMSTART, torch.float32, "eager")
    t = groups[0][0][0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_logprobs(model, [t])
    counts = cost.parameter_counts(model.config)
    expected = cost.forward_flops(
        model.config,
        counts,
        len(t.token_ids),
        len(t.token_ids),
        int(t.policy_mask.sum()),
        len(t.prompt.pixel_values),
    )
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.15)
