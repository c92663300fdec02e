"""Where an evaluation's files go; and those of one that is not finished, which goes on with as many
ranks.

Each rank writes one of its own: the settings in the first line, then a record per response. Their
names hold a hash of the settings, so that another evaluation in the same folder keeps its own.
"""

import hashlib
import json
from dataclasses import asdict, fields
from itertools import takewhile, zip_longest
from pathlib import Path

import torch.distributed as dist

from engine.distributed import world
from files.records import checksum

# settings that the default folder is named after, where they are not the usual ones
NAMED = {
    *("kb", "data", "split", "examples", "captions", "limit", "shuffle_seed", "max_turns", "topk"),
    *("temperature", "samples", "oracle_image", "sampler", "seed"),
}


def default_folder(args) -> Path:
    """Beside the checkpoint; those of an endpoint or of a Hugging Face name go to runs/NAME.

    args: evaluate.py's. What differs from a plain evaluation is in the name, so that its results
    are not written over: latest-eval-static, latest-eval-validation-temperature-1-samples-8.
    """
    suffix = "eval" if args.mode == "agent" else f"eval-{args.mode}"
    for field in fields(args):
        name, value = field.name, getattr(args, field.name)
        if name not in NAMED or value == field.default:
            continue
        if isinstance(value, bool):
            suffix += f"-{name}".replace("_", "-")
        elif isinstance(value, int | float):
            suffix += f"-{name}-{value:g}".replace("_", "-")
        else:  # a split, or a file
            suffix += f"-{Path(value).stem}"
    if args.base_url or not args.ckpt.exists():
        return Path("runs") / str(args.model or args.ckpt).replace("/", "-") / suffix
    return args.ckpt.parent / f"{args.ckpt.name}-{suffix}"


def resolved(ckpt: Path | None) -> Path | None:
    """The folder that a link points to now; a Hugging Face name as it is."""
    return ckpt.resolve() if ckpt and ckpt.exists() else ckpt


def conditions_of(args, ckpt: Path | None, cfg, questions: list, kb) -> dict:
    """What must be the same for an evaluation that was stopped to go on.

    args: evaluate.py's; ckpt: resolved; cfg: a RolloutConfig.
    """
    return {
        "policy": args.model if args.base_url else str(ckpt),
        "base_url": args.base_url,
        "weights": weights_of(ckpt),
        "mode": args.mode,
        "kb": [str(args.kb), *kb.sizes, args.text_url, args.image_url, str(args.captions)],
        "manifest": digest(args.kb / "manifest.json"),
        "captions": digest(args.captions),
        "data": str(args.data),
        "split": args.split,
        "asked": hashlib.sha256(repr(questions).encode()).hexdigest()[:16],
        "seed": args.seed,
        "batch": args.batch,
        "rollout": asdict(cfg),
    }


def weights_of(ckpt: Path | None) -> str:
    """Changes with the weights in a folder: their checksums, else their files' sizes and times."""
    if ckpt is None:
        return ""
    if (ckpt / "checksums.json").exists():
        return digest(ckpt / "checksums.json")
    files = [(file.name, file.stat()) for file in sorted(ckpt.glob("*.safetensors"))]
    marks = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
    return hashlib.sha256(marks.encode()).hexdigest()[:16] if files else ""


def digest(path: Path | None) -> str:
    """Of a file's contents; "" where there is none."""
    return checksum(path)[:16] if path and path.is_file() else ""


# -------------------------------------------------------------------- what is not finished


def first_line(conditions: dict) -> str:
    return json.dumps(conditions, sort_keys=True, default=str) + "\n"


def name_of(conditions: dict) -> str:
    """What the names of all ranks' files begin with."""
    return f"predictions.part-{hashlib.sha256(first_line(conditions).encode()).hexdigest()[:8]}"


def part_of(out: Path, conditions: dict) -> Path:
    """This rank's file."""
    rank, ranks = world()
    of_ranks = f"-{rank}-of-{ranks}" if ranks > 1 else ""
    return out / f"{name_of(conditions)}{of_ranks}.jsonl"


def resume(unfinished: Path, conditions: dict, ids: list, size: int) -> list[dict]:
    """The records of whole batches, of `size` each, that an evaluation with the same settings left.

    ids: of the questions that this rank asks, one per response; a record of another question and
    all after it are dropped. The file then holds the settings and what is returned.
    """
    records = []
    if unfinished.exists():
        # a line ends with "\n" alone: text may hold what else `splitlines` takes for an end
        with open(unfinished, encoding="utf-8", errors="replace", newline="\n") as file:
            lines = file.readlines()[1:]
        records = [json.loads(line) for line in takewhile(lambda line: line.endswith("}\n"), lines)]
    pairs = takewhile(lambda pair: pair[0]["id"] == pair[1], zip(records, ids))
    records = [record for record, _ in pairs]
    records = records[: len(records) // size * size]
    unfinished.write_text(first_line(conditions), encoding="utf-8")
    append(unfinished, records)
    return records


def append(unfinished: Path, records: list[dict]):
    with open(unfinished, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def all_in_turn(records: list, size: int) -> list | None:
    """The records of all ranks, which took the batches, of `size` records, in turn; on rank 0."""
    rank, ranks = world()
    if ranks == 1:
        return records
    parts = [None] * ranks if rank == 0 else None
    dist.gather_object(records, parts)
    if rank > 0:
        return None
    batches = [[part[i : i + size] for i in range(0, len(part), size)] for part in parts]
    turns = zip_longest(*batches, fillvalue=[])
    return [record for turn in turns for batch in turn for record in batch]


def remove(out: Path, conditions: dict):
    """The files of this evaluation, of however many ranks, when it is finished."""
    for path in out.glob(f"{name_of(conditions)}*.jsonl"):
        path.unlink()
