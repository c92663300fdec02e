"""Checkpoints: a folder that `from_pretrained` loads unaided, with the trainer's state beside it.

    OUT/step-000025/  config.json, model*.safetensors (float32), the processor's files; or adapters
                      recipe.json              the run's configuration
                      trainer.json             counters
                      optimizer-R.safetensors  rank R's part of the optimizer's moments
                      surplus-R.safetensors    groups that dynamic sampling left over on rank R
                      checksums.json           size and SHA-256 of every other file
    OUT/latest        a link to the newest

A checkpoint is written under another name, flushed to disk, then renamed; the link is replaced in
one step. A run killed at any moment has its last checkpoint, whole.

    python -m engine.checkpoint merge --ckpt runs/small/latest --out merged    # adapters → weights
"""

import fcntl
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from engine import distributed, vision_attention
from engine.distributed import all_objects, barrier, world
from engine.weights import base_of, check_device, load_config, load_shards
from files.records import FAULTS, MISREAD, checksum
from files.terminal import fail
from model import load_policy

RESPONSE_PARTS = ("token_ids", "policy_mask", "logprobs")
# What may differ where a run is resumed: where things lie, how long it goes on, what it reports.
# Anything else changes its figures, if only by rounding.
# fmt: off
MAY_DIFFER = {
    "init", "kb", "text_url", "image_url", "index_device", "data", "images", "qtypes", "captions",
    "out", "resume", "change", "steps", "max_minutes", "max_bad_steps", "offload",
    "eval_every", "eval_questions", "save_every", "keep", "tensorboard", "wandb", "peak_tflops",
    "plan", "plan_gpus", "plan_gpu_gb", "plan_mfu", "plan_bandwidth",
}
# fmt: on


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def save(policy, optimizer, cfg, counters: dict, surplus: list):
    """Write OUT/step-N and point OUT/latest at it. All ranks call it together.

    counters: what trainer.json keeps, with "step"; of "drawn", each rank's. surplus: groups,
    (responses, rewards (G,)), of this rank.
    """
    rank, ranks = world()
    drawn = all_objects([counters.get("drawn", 0)])  # ranks pass over unreadable pictures
    folder = cfg.out / f"step-{counters['step']:06d}"
    work = cfg.out / f".{folder.name}.writing"
    if rank == 0:
        for unfinished in cfg.out.glob(".step-*.writing"):  # a kill left it
            shutil.rmtree(unfinished, ignore_errors=True)
        work.mkdir(parents=True)
    barrier()
    # 1) Each rank writes its own part of the state, rank 0 the model.
    mine = [work / f"optimizer-{rank}.safetensors", work / f"surplus-{rank}.safetensors"]
    save_optimizer(policy.model, optimizer, mine[0])
    save_surplus(surplus, mine[1])
    weights = None  # adapters are small: save_pretrained takes them from the model
    if not cfg.lora_rank:  # gathered tensor by tensor, held by rank 0 alone
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(policy.model, options=options)
        if policy.model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # the same numbers as the embeddings
    if rank == 0:
        policy.model.save_pretrained(work, state_dict=weights, max_shard_size="5GB")
        policy.processor.save_pretrained(work)
        (work / "recipe.json").write_text(json.dumps(asdict(cfg), indent=1, default=str))
        (work / "trainer.json").write_text(json.dumps(counters | {"ranks": ranks, "drawn": drawn}))
        ranked = ("optimizer-", "surplus-")
        mine += [file for file in work.iterdir() if not file.name.startswith(ranked)]
    # 2) All of it is on disk, with its checksums, before the folder gets its name.
    with ThreadPoolExecutor() as pool:  # a large model is several files
        digests = pool.map(checksum, mine)
    sums = [(file.name, [file.stat().st_size, digest]) for file, digest in zip(mine, digests)]
    sums = dict(all_objects(sums))
    for file in mine:
        sync(file)
    barrier()
    if rank == 0:
        (work / "checksums.json").write_text(json.dumps(sums, indent=1))
        sync(work / "checksums.json")
        sync(work)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
        # 3) The link, in one step; then the oldest go.
        link = cfg.out / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, cfg.out / "latest")
        sync(cfg.out)
        # of this run alone: another's higher steps may lie in the folder, too
        steps = steps_in(cfg.out)
        for old in steps[: steps.index(folder) + 1][: -cfg.keep]:
            shutil.rmtree(old)
    barrier()


def steps_in(out: Path) -> list[Path]:
    """The folders of checkpoints, the oldest first. `step-000020-eval`, an evaluation, is none."""
    steps = [path for path in out.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


def save_optimizer(model, optimizer, path: Path):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            tensors[f"{names[id(parameter)]}|{key}"] = local(value).cpu().contiguous()
    save_file(tensors, path)


def save_surplus(surplus: list, path: Path):
    tensors = {}
    for g, (responses, rewards) in enumerate(surplus):
        tensors[f"{g}.totals"] = rewards
        for i, response in enumerate(responses):
            for part in RESPONSE_PARTS:
                tensors[f"{g}.{i}.{part}"] = getattr(response, part).contiguous()
    questions = [responses[0].question.id for responses, _ in surplus]
    save_file(tensors, path, {"questions": json.dumps(questions)})


def sync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def verify(folder: Path) -> dict:
    """The trainer's state of a checkpoint that is whole.

    Raises ValueError otherwise, or when it is of another number of ranks.
    """
    rank, ranks = world()
    bad = []
    try:
        state = json.loads((folder / "trainer.json").read_text())
        sums = json.loads((folder / "checksums.json").read_text())
        for name, (size, digest) in sums.items():
            file = folder / name
            mine = rank == 0 or name.endswith(f"-{rank}.safetensors")  # others read the rest
            if file.stat().st_size != size or (mine and checksum(file) != digest):
                bad.append(name)
        state["ranks"], state["step"] = int(state["ranks"]), int(state["step"])
        if state["ranks"] == ranks and isinstance(state["drawn"], list):  # else an older run's
            state["drawn"] = int(state["drawn"][rank])
    except (OSError, *MISREAD) as error:
        raise ValueError(f"{folder} is no whole checkpoint ({error!r})") from None
    if bad:
        raise ValueError(
            f"{folder} is damaged: {', '.join(bad)} is not what was written. Delete "
            f"{folder.resolve()} and point {folder} at an older checkpoint beside it"
        )
    if state.pop("ranks") != ranks:
        raise ValueError(
            f"{folder} was written by another number of ranks than {ranks} and can only be "
            "resumed by as many"
        )
    return state


def load(cfg, device: str) -> tuple:
    """(policy, optimizer, counters, surplus), from OUT/latest or, where that is not, from `init`.

    Without something to resume, counters and surplus are empty. See `restore` for a surplus's form.
    """
    check_device(cfg.init, device)
    take(cfg.out)
    latest = cfg.out / "latest"
    resuming = cfg.resume and latest.exists()
    if not resuming:
        refuse_to_start_anew(cfg)
    counters = {}
    if resuming:
        refuse_changes(cfg)
        counters = verify(latest)
    torch.manual_seed(cfg.seed)  # fresh adapters, the same on every rank
    dtype = getattr(torch, cfg.dtype)

    def place(model, name):
        distributed.shard(model, dtype, device, cfg.offload)
        load_shards(model, name, device, cfg.offload)

    adapters = cfg.lora_rank > 0  # on a frozen model in `dtype`; else float32 masters, sharded
    policy = load_policy(
        latest if resuming else cfg.init,
        dtype if adapters else torch.float32,
        vision_attention.choose(cfg.attn, dtype, device),  # by what is computed in, not held
        device,
        place if dist.is_initialized() and not adapters else None,
        cfg.lora_rank,
        cfg.freeze_vision,
    )
    if cfg.activation_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapters:  # peft asks for gradients of what goes in, through a frozen vision tower too
            policy.model.disable_input_require_grads()
    optimizer = torch.optim.AdamW(
        [p for p in policy.model.parameters() if p.requires_grad],
        lr=cfg.lr,
        betas=(0.9, cfg.beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    surplus = restore(policy, optimizer, cfg) if resuming else []
    trim_metrics(cfg, counters.get("step", -1), counters.get("evaluated", -1))
    return policy, optimizer, counters, surplus


TAKEN = {}  # {folder: its open lock}, until this process ends


def take(out: Path):
    """Keep other runs out of a folder. Raises ValueError where another one is writing to it."""
    if world()[0] > 0 or out.resolve() in TAKEN:
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")  # noqa: SIM115 (open as long as the process)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is writing to {out}: wait for it, or name another folder with --out"
        ) from None
    TAKEN[out.resolve()] = lock


def refuse_to_start_anew(cfg):
    """Raises ValueError where OUT holds checkpoints, but nothing says which one to go on with."""
    steps = [path.name for path in steps_in(cfg.out)]
    if steps:
        raise ValueError(
            f"{cfg.out} holds {', '.join(steps[-3:])} but no link `latest` to one of them. Make "
            f"it (ln -sfn {steps[-1]} {cfg.out / 'latest'}) and give --resume, or name another "
            "folder with --out"
        )


def refuse_changes(cfg):
    """Raises ValueError where a run would go on with settings that change its figures, and that
    cfg.change does not name."""
    named = {name.lstrip("-").replace("-", "_") for name in cfg.change}
    now = json.loads(json.dumps(asdict(cfg), default=str))
    unknown = named - now.keys()
    if unknown:
        raise ValueError(f"--change {' '.join(sorted(unknown))}: there is no such setting")
    try:
        saved = json.loads((cfg.out / "latest" / "recipe.json").read_text())
        differ = [name for name in now if saved.get(name, now[name]) != now[name]]
    except (OSError, *MISREAD) as error:
        raise ValueError(f"{cfg.out / 'latest'} is no whole checkpoint ({error})") from None
    refused = [name for name in differ if name not in MAY_DIFFER | named]
    if refused:
        flags = [f"--{name.replace('_', '-')} {saved[name]}" for name in refused]
        raise ValueError(
            f"the run in {cfg.out} has {', '.join(flags)}. Go on with that, or take the new "
            f"values by adding: --change {' '.join(refused)}"
        )


@torch.no_grad()
def restore(policy, optimizer, cfg) -> list[tuple]:
    """Fill the optimizer from OUT/latest; the weights were already loaded from there.

    Returns the surplus: (question id, [(token_ids, policy_mask, logprobs)] of each response,
    rewards (G,)) per group.
    """
    folder, rank = cfg.out / "latest", world()[0]
    moments = load_file(folder / f"optimizer-{rank}.safetensors")
    for name, parameter in policy.model.named_parameters():
        if f"{name}|step" not in moments:
            continue
        state = optimizer.state[parameter]
        state["step"] = moments[f"{name}|step"].to(local(parameter).device)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(parameter)
            local(state[key]).copy_(moments[f"{name}|{key}"])
    path = folder / f"surplus-{rank}.safetensors"
    with safe_open(path, "pt") as file:
        questions = json.loads(file.metadata()["questions"])
    tensors = load_file(path)
    surplus = []
    for g, question in enumerate(questions):
        rewards = tensors[f"{g}.totals"]
        responses = [
            [tensors[f"{g}.{i}.{part}"] for part in RESPONSE_PARTS] for i in range(len(rewards))
        ]
        surplus.append((question, responses, rewards))
    return surplus


def trim_metrics(cfg, step: int, evaluated: int):
    """Drop what a killed run logged after its last checkpoint, torn lines included.

    It will be logged again.
    """
    path = cfg.out / "metrics.jsonl"
    if world()[0] > 0 or not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("}\n"):
            record = json.loads(line)
            last = evaluated if "eval_n" in record else step
            if record["step"] <= last:
                kept.append(line)
    path.write_text("".join(kept))


@dataclass
class Merge:
    """Adapters into the weights they were trained on: a folder without adapters."""

    ckpt: Path
    out: Path


def merge(args: Merge):
    from peft import PeftModel
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    base = base_of(args.ckpt)
    if base == args.ckpt:
        raise ValueError(f"{args.ckpt} holds no adapters")
    load_config(args.ckpt)  # refuses another kind of model, and folders that name code
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype="auto")
    dtype = model.dtype
    adapted = PeftModel.from_pretrained(model.float(), args.ckpt)
    merged = adapted.merge_and_unload()  # added in float32
    merged.to(dtype).save_pretrained(args.out)
    AutoProcessor.from_pretrained(args.ckpt).save_pretrained(args.out)
    shutil.copy(args.ckpt / "recipe.json", args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    import tyro

    try:
        merge(tyro.extras.subcommand_cli_from_dict({"merge": Merge}))
    except FAULTS as error:
        fail(error)
