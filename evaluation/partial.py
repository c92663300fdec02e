"""The files of an evaluation that is not finished: with as many ranks it goes on where it stopped.

Each rank writes one of its own: the settings in the first line, then a record per response.
"""

import json
from itertools import zip_longest
from pathlib import Path

import torch.distributed as dist

from engine.distributed import world


def part_of(out: Path, rank: int, ranks: int) -> Path:
    """This rank's file."""
    of_ranks = f"-{rank}-of-{ranks}" if ranks > 1 else ""
    return out / f"predictions.part{of_ranks}.jsonl"


def resume(unfinished: Path, conditions: dict, size: int) -> list[dict]:
    """The records of whole batches, of `size` each, that an evaluation with the same settings left.

    The file then holds the settings and these alone; what another evaluation left is renamed.
    """
    first, lines = json.dumps(conditions, sort_keys=True, default=str) + "\n", []
    if unfinished.exists():
        with open(unfinished, encoding="utf-8") as file:
            if file.readline() == first:
                lines = [line for line in file if line.endswith("\n")]
            else:
                unfinished.rename(unfinished.with_suffix(".old"))
    lines = lines[: len(lines) // size * size]
    unfinished.write_text("".join([first, *lines]), encoding="utf-8")
    return [json.loads(line) for line in lines]


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


def remove(out: Path, ranks: int):
    """The ranks' files, when the evaluation is finished."""
    for rank in range(ranks):
        part_of(out, rank, ranks).unlink()
