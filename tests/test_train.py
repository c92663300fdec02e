"""Training: ranks agree, a resumed run is the run that was not killed, and a step does what it should."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import train as train_module
from conftest import ROOT, WARMSTART
from model import load_policy, token_logprobs
from reward import reward
from rollout import sample
from train import update


@pytest.fixture(scope="module")
def groups(policy, kb, questions):
    """Sampled groups with rewards, made once; the tests train on copies of the policy."""
    cfg = replace(train_module.PRESETS["tiny"], group_size=4)
    trajectories = sample(*policy, kb, questions[:6], cfg, torch.Generator().manual_seed(0))
    totals = torch.tensor([reward(t, cfg).total for t in trajectories]).view(6, 4) + torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    return [(trajectories[4 * i:4 * i + 4], totals[i]) for i in range(6)]


CFG = replace(train_module.PRESETS["tiny"], group_size=4, updates_per_step=1, micro_batch=5)


def first_step(share, spare):
    model, _ = load_policy(WARMSTART, torch.float32)
    if dist.is_initialized():
        train_module.shard(model, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = update(model, optimizer, share, CFG, spare=spare)
    weight = model.get_parameter("model.language_model.layers.1.mlp.up_proj.weight")
    return stats, (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()


def rank_main(rank, groups, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    # Unequal shares: rank 1 has a third of the work, and so fewer micro-batches.
    stats, weight = first_step(groups[:4] if rank == 0 else groups[4:], groups[0][0][0])
    stats_idle, _ = first_step(groups if rank == 0 else [], groups[0][0][0])  # and here it has none at all
    if rank == 0:
        torch.save({"stats": stats, "weight": weight, "idle": stats_idle}, folder / "two.pt")
    dist.destroy_process_group()


def test_two_ranks_make_the_step_of_one(groups, tmp_path):
    stats, weight = first_step(groups, groups[0][0][0])
    mp.spawn(rank_main, (groups, tmp_path), nprocs=2)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name in ("loss", "grad_norm", "entropy"):
        assert two["stats"][name] == pytest.approx(stats[name], rel=1e-4, abs=1e-6), name
        assert two["idle"][name] == pytest.approx(stats[name], rel=1e-4, abs=1e-6), name
    assert stats["grad_norm"] > 0 and torch.allclose(weight, two["weight"], atol=1e-5)


def test_micro_batches_do_not_change_the_step(groups, monkeypatch):
    stats, weight = first_step(groups, None)
    monkeypatch.setattr(sys.modules[__name__], "CFG", replace(CFG, micro_batch=24))
    again, same = first_step(groups, None)
    assert again["loss"] == pytest.approx(stats["loss"], rel=1e-4) and torch.allclose(weight, same, atol=1e-5)


def test_a_step_makes_good_responses_likelier(groups):
    model, _ = load_policy(WARMSTART, torch.float32)
    def score(): return torch.stack([token_logprobs(model, g[0])[0].sum(1) @ (g[1] - g[1].mean()) for g in groups]).sum().item()
    with torch.no_grad():
        before = score()
    update(model, torch.optim.AdamW(model.parameters(), lr=1e-5), groups, replace(CFG, lr=1e-5, warmup_steps=0))
    with torch.no_grad():
        assert score() > before


def test_a_non_finite_gradient_stops_before_the_weights_are_touched(groups):
    model, _ = load_policy(WARMSTART, torch.float32)
    broken = [(trajectories, totals * torch.nan) for trajectories, totals in groups]
    before = model.lm_head.weight.clone()
    with pytest.raises(FloatingPointError, match="not finite"):
        update(model, torch.optim.SGD(model.parameters(), lr=1.0), broken, CFG)
    assert torch.equal(before, model.lm_head.weight)


def run(kb_folder, data_folder, out, *flags, launcher=()):
    command = [sys.executable, *launcher, "train.py", "tiny", "--kb", kb_folder, "--data", data_folder, "--out", out, "--questions-per-step", "4",
               "--eval-questions", "8", "--eval-every", "100", "--save-every", "1", *flags]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def comparable(records):
    timed = {"seconds_rollout", "seconds_search", "seconds_train", "tokens_per_second", "eval_seconds"}
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


def test_a_resumed_run_is_the_run_that_was_not_killed(kb_folder, data_folder, tmp_path):
    whole = run(kb_folder, data_folder, tmp_path / "whole", "--steps", "3", "--max-refills", "1")
    run(kb_folder, data_folder, tmp_path / "cut", "--steps", "2", "--max-refills", "1")
    resumed = run(kb_folder, data_folder, tmp_path / "cut", "--steps", "3", "--max-refills", "1", "--resume")
    last = [r for r in comparable(resumed) if r["step"] == 3]
    assert last == [r for r in comparable(whole) if r["step"] == 3] and len(last) == 2
    assert [r["step"] for r in whole if "reward_mean" in r] == [1, 2, 3] and (tmp_path / "whole" / "curves.png").stat().st_size > 10_000
    assert {"eval_sampled_overall", "eval_greedy_overall", "eval_greedy_compare", "eval_format_rate"} <= set(whole[0]) and whole[0]["step"] == 0
    assert all(r["logprob_diff_max"] < 1e-3 for r in whole if "reward_mean" in r)
    model, processor = load_policy(tmp_path / "whole" / "latest", torch.float32)  # a checkpoint is a model
    assert sum(p.numel() for p in model.parameters()) > 1_000_000


def test_two_processes_train(kb_folder, data_folder, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29618")
    records = run(kb_folder, data_folder, tmp_path / "two", "--steps", "2", launcher=launcher)
    assert [r["step"] for r in records if "reward_mean" in r] == [1, 2] and records[-1]["eval_n"] == 8
    assert all(r["logprob_diff_max"] < 1e-3 for r in records if "reward_mean" in r)


def test_an_existing_run_is_not_overwritten(kb_folder, data_folder, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("{}\n")
    done = subprocess.run([sys.executable, "train.py", "--kb", kb_folder, "--data", data_folder, "--out", tmp_path / "old"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "error:" in done.stderr and "--resume" in done.stderr
    assert (tmp_path / "old" / "metrics.jsonl").read_text() == "{}\n"
