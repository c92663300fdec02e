"""Training: a step does what it should, and two processes train."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, WARMSTART

import train as train_module
from engine.packing import update
from model import load_policy, token_logprobs
from reward import reward
from rollout import sample


@pytest.fixture(scope="module")
def groups(policy, kb, questions):
    """Sampled groups with rewards, made once; the tests train on copies of the policy."""
    cfg = replace(train_module.PRESETS["tiny"], group_size=4)
    responses = sample(*policy, kb, questions[:6], cfg, torch.Generator().manual_seed(0))
    totals = torch.tensor([reward(t, cfg).total for t in responses]).view(6, 4) + torch.randn(
        6, 4, generator=torch.Generator().manual_seed(1)
    )
    return [(responses[4 * i : 4 * i + 4], totals[i]) for i in range(6)]


CFG = replace(train_module.PRESETS["tiny"], group_size=4, updates_per_step=1, micro_tokens=2000)


def first_step(share, spare, cfg=CFG):
    model, _ = load_policy(WARMSTART, torch.float32)
    stats = update(model, torch.optim.SGD(model.parameters(), lr=1.0), share, cfg, spare=spare)
    return stats, model.get_parameter(
        "model.language_model.layers.1.mlp.up_proj.weight"
    ).detach().clone()


def test_micro_batches_do_not_change_the_step(groups):
    stats, weight = first_step(groups, None)
    again, same = first_step(groups, None, replace(CFG, micro_tokens=50_000))
    assert again["loss"] == pytest.approx(stats["loss"], rel=1e-4) and torch.allclose(
        weight, same, atol=1e-5
    )


def test_a_step_makes_good_responses_likelier(groups):
    model, _ = load_policy(WARMSTART, torch.float32)

    def score():
        return (
            torch.stack(
                [token_logprobs(model, g[0])[0].sum(1) @ (g[1] - g[1].mean()) for g in groups]
            )
            .sum()
            .item()
        )

    with torch.no_grad():
        before = score()
    update(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-5),
        groups,
        replace(CFG, lr=1e-5, warmup_steps=0),
    )
    with torch.no_grad():
        assert score() > before


def run(kb_folder, data_folder, out, *flags, launcher=()):
    command = [
        sys.executable,
        *launcher,
        "train.py",
        "tiny",
        "--kb",
        kb_folder,
        "--data",
        data_folder,
        "--out",
        out,
        "--questions-per-step",
        "4",
        "--group-size",
        "4",
        "--eval-questions",
        "4",
        "--eval-every",
        "100",
        "--save-every",
        "1",
        *flags,
    ]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def test_two_processes_train(kb_folder, data_folder, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29618")
    records = run(kb_folder, data_folder, tmp_path / "two", "--steps", "2", launcher=launcher)
    assert [r["step"] for r in records if "reward_mean" in r] == [1, 2] and records[-1][
        "eval_n"
    ] == 4
    assert all(r["logprob_diff_max"] < 1e-3 for r in records if "reward_mean" in r)


def test_an_existing_run_is_not_overwritten(kb_folder, data_folder, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("{}\n")
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            "--kb",
            kb_folder,
            "--data",
            data_folder,
            "--out",
            tmp_path / "old",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "error:" in done.stderr and "--resume" in done.stderr
    assert (tmp_path / "old" / "metrics.jsonl").read_text() == "{}\n"
