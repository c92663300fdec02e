"""The files of an evaluation that is not finished: it goes on where it was stopped.

Each rank writes one of its own: the settings in the first line, then a record per response.
"""

import json
from itertools import zip_longest
from pathlib import Path

from engine.distributed import all_objects


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


def write_lines(path: Path, records: list[dict], mode: str):
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in records)


def all_in_turn(records: list[dict], size: int) -> list[dict]:
    """The records of all ranks, which took the batches, of `size` records, in turn."""
    parts = all_objects([records])
    batches = [[part[i : i + size] for i in range(0, len(part), size)] for part in parts]
    turns = zip_longest(*batches, fillvalue=[])
    return [record for turn in turns for batch in turn for record in batch]


def finish(out: Path, records: list[dict]):
    """All records to predictions.jsonl, without the settings; the ranks' files go."""
    work = out / "predictions.jsonl.new"
    write_lines(work, records, "w")
    work.replace(out / "predictions.jsonl")
    for part in out.glob("predictions.part*.jsonl"):
        part.unlink()
