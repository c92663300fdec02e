"""Checkpoints: a folder that `from_pretrained` loads unaided, with the trainer's state beside it.

    OUT/step-000025/  config.json, model*.safetensors (float32), the processor's files: a model like any other
                      recipe.json            the run's configuration
                      trainer.json           counters
                      optimizer-R.safetensors  rank R's part of the optimizer's moments
                      surplus-R.safetensors    groups that dynamic sampling left over on rank R
                      checksums.json         size and SHA-256 of every file
    OUT/latest        a link to the newest

A checkpoint is written under another name, flushed to disk, then renamed; the link is replaced in one step. A run killed
at any moment has its last checkpoint, whole. On resuming, every file is compared with its checksum first.

    python -m engine.checkpoint merge --ckpt runs/small/latest --out merged      # adapters into the weights they were trained on
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from distributed import all_objects, barrier, world
from files.records import checksum
from rollout import Response, build_prompt


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def save(model, processor, optimizer, cfg, state: dict, surplus: list):
    """Write OUT/step-N and point OUT/latest at it. All ranks call it together."""
    rank, ranks = world()
    folder = cfg.out / f"step-{state['step']:06d}"
    work = cfg.out / f".{folder.name}.writing"
    if rank == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    barrier()
    names = {id(p): name for name, p in model.named_parameters()}
    save_file(
        {
            f"{names[id(p)]}|{key}": local(value).cpu().contiguous()
            for p, moments in optimizer.state.items()
            for key, value in moments.items()
        },
        work / f"optimizer-{rank}.safetensors",
    )
    tensors = {
        f"{g}.{i}.{name}": getattr(t, name).contiguous()
        for g, (group, _) in enumerate(surplus)
        for i, t in enumerate(group)
        for name in ("token_ids", "policy_mask", "logprobs")
    } | {f"{g}.totals": totals for g, (_, totals) in enumerate(surplus)}
    save_file(
        tensors,
        work / f"surplus-{rank}.safetensors",
        {"questions": json.dumps([group[0].question.id for group, _ in surplus])},
    )
    if cfg.lora_rank:
        weights = None
    else:  # gathered tensor by tensor, held by rank 0 alone
        weights = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    if rank == 0:
        model.save_pretrained(work, state_dict=weights, max_shard_size="5GB")
        processor.save_pretrained(work)
        (work / "recipe.json").write_text(json.dumps(asdict(cfg), indent=1, default=str))
        (work / "trainer.json").write_text(json.dumps(state | {"ranks": ranks}))
    own = [
        f
        for f in work.iterdir()
        if f.name in (f"optimizer-{rank}.safetensors", f"surplus-{rank}.safetensors")
        or rank == 0
        and not f.name.startswith(("optimizer-", "surplus-"))
    ]
    sums = dict(all_objects([(f.name, [f.stat().st_size, checksum(f)]) for f in own]))
    for file in own:  # on disk before the folder gets its name
        sync(file)
    barrier()
    if rank == 0:
        (work / "checksums.json").write_text(json.dumps(sums, indent=1))
        sync(work / "checksums.json")
        sync(work)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
        link = cfg.out / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, cfg.out / "latest")
        sync(cfg.out)
        for old in sorted(cfg.out.glob("step-*"))[: -cfg.keep]:
            shutil.rmtree(old)
    barrier()


def sync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def verify(folder: Path) -> dict:
    """The trainer's state of a checkpoint that is whole. Raises ValueError otherwise, or when it is of another number of ranks."""
    rank, ranks = world()
    try:
        state, sums = (
            json.loads((folder / name).read_text()) for name in ("trainer.json", "checksums.json")
        )
        bad = [
            name
            for name, (size, digest) in sums.items()
            if (folder / name).stat().st_size != size
            or (rank == 0 or name.endswith(f"-{rank}.safetensors"))
            and checksum(folder / name) != digest
        ]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no whole checkpoint ({error})") from None
    if bad:
        raise ValueError(
            f"{folder} is damaged: {', '.join(bad)} is not what was written. Delete {folder.resolve()} and point "
            f"{folder} at an older checkpoint beside it"
        )
    if state.pop("ranks") != ranks:
        raise ValueError(
            f"{folder} was written by another number of ranks than {ranks} and can only be resumed by as many"
        )
    return state


@torch.no_grad()
def restore(model, processor, optimizer, cfg, questions: dict) -> list:
    """Fill the optimizer from OUT/latest and return its surplus; the weights were already loaded from there."""
    folder, rank = cfg.out / "latest", world()[0]
    moments = load_file(folder / f"optimizer-{rank}.safetensors")
    for name, p in model.named_parameters():
        if f"{name}|step" in moments:
            optimizer.state[p] = {"step": moments[f"{name}|step"].to(local(p).device)}
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][key] = torch.zeros_like(p)
                local(optimizer.state[p][key]).copy_(moments[f"{name}|{key}"])
    surplus, path = [], folder / f"surplus-{rank}.safetensors"
    with safe_open(path, "pt") as file:
        ids = json.loads(file.metadata()["questions"])
    tensors = load_file(path)
    for g, name in enumerate(ids):
        prompt, totals = (
            build_prompt(model, processor, questions[name], cfg),
            tensors[f"{g}.totals"],
        )
        parts = [
            [tensors[f"{g}.{i}.{part}"] for part in ("token_ids", "policy_mask", "logprobs")]
            for i in range(len(totals))
        ]
        surplus.append(
            ([Response(questions[name], prompt, *part, [], None, "") for part in parts], totals)
        )
    return surplus


def trim_metrics(cfg, step: int, evaluated: int):
    """Drop what a killed run logged after its last checkpoint, torn lines included; it will be logged again."""
    path = cfg.out / "metrics.jsonl"
    if world()[0] == 0 and path.exists():
        records = [
            (line, json.loads(line))
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("}\n")
        ]
        path.write_text(
            "".join(
                line for line, r in records if r["step"] <= (evaluated if "eval_n" in r else step)
            )
        )


@dataclass
class Merge:
    """Adapters into the weights they were trained on: a folder without adapters."""

    ckpt: Path
    out: Path


def merge(args: Merge):
    from peft import PeftModel
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    if not (args.ckpt / "adapter_config.json").exists():
        raise ValueError(f"{args.ckpt} holds no adapters")
    base = json.loads((args.ckpt / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype="auto")
    dtype = model.dtype
    PeftModel.from_pretrained(model.float(), args.ckpt).merge_and_unload().to(
        dtype
    ).save_pretrained(args.out)  # added in float32
    AutoProcessor.from_pretrained(args.ckpt).save_pretrained(args.out)
    shutil.copy(args.ckpt / "recipe.json", args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    import tyro

    try:
        merge(tyro.extras.subcommand_cli_from_dict({"merge": Merge}))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
