"""Checkpoints: a folder that `from_pretrained` loads unaided, with the trainer's state beside it.

OUT/step-000025 holds the model, the processor, `recipe.json` (the run's configuration), `trainer.pt` (optimizer moments,
counters) and, for each rank, `surplus-R.pt` (groups that dynamic sampling left over). It is written under another name,
flushed to disk, then renamed; `OUT/latest` is a link that is replaced in one step. A killed run has its last checkpoint.
"""
from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict

import torch
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)

from distributed import barrier, world
from rollout import Trajectory, build_prompt


def save(model, processor, optimizer, cfg, state: dict, surplus: list):
    """Write OUT/step-N and point OUT/latest at it. A folder `from_pretrained` loads, the trainer's state beside it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)
    rank, ranks = world()
    surplus = [{"id": g[0][0].question.id, "totals": g[1], "responses": [
        {"ids": t.token_ids, "mask": t.policy_mask, "logprobs": t.logprobs} for t in g[0]]} for g in surplus]
    folder = cfg.out / f"step-{state['step']:06d}"
    work = cfg.out / f".{folder.name}.writing"
    if rank == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    barrier()
    torch.save(surplus, work / f"surplus-{rank}.pt")
    if rank == 0:
        model.save_pretrained(work, state_dict=weights)
        processor.save_pretrained(work)
        (work / "recipe.json").write_text(json.dumps(asdict(cfg), indent=1, default=str))
        torch.save({"optimizer": moments, **state, "ranks": ranks}, work / "trainer.pt")
    barrier()
    if rank == 0:
        for file in work.iterdir():  # on disk before it gets its name
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
        link = cfg.out / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, cfg.out / "latest")
        for old in sorted(cfg.out.glob("step-*"))[:-cfg.keep]:
            shutil.rmtree(old)
    barrier()


def restore(model, processor, optimizer, cfg, questions: dict) -> tuple[dict, list]:
    """Trainer state and surplus of OUT/latest; the weights were already loaded from there."""
    rank, ranks = world()
    state = torch.load(cfg.out / "latest" / "trainer.pt", weights_only=True, map_location="cpu")
    if state["ranks"] != ranks:
        raise ValueError(f"{cfg.out / 'latest'} was written by {state['ranks']} ranks and can only be resumed by as many, not {ranks}")
    set_optimizer_state_dict(model, optimizer, state.pop("optimizer"), options=StateDictOptions(full_state_dict=True))
    surplus = []
    for group in torch.load(cfg.out / "latest" / f"surplus-{rank}.pt", weights_only=True):
        question = questions[group["id"]]
        prompt = build_prompt(model, processor, question, cfg)
        surplus.append(([Trajectory(question, prompt, r["ids"], r["mask"], r["logprobs"], [], None, "") for r in group["responses"]], group["totals"]))
    return state, surplus


def trim_metrics(cfg, step: int):
    """Drop what a killed run logged after its last checkpoint, torn lines included; it will be logged again."""
    path = cfg.out / "metrics.jsonl"
    if world()[0] == 0 and path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
