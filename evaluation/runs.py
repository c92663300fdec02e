"""What a table of many runs needs: some runs at a time, each with a log, resumable.

A row of a table is a run of `train.py` with other flags, once per seed, in the folder OUT/ROW-SEED.
Its evaluation is in the folder's eval/; where that is complete, the run is done and not made again.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Job(NamedTuple):
    """Commands, one after another, that fill a folder; the last one writes its eval/."""

    folder: Path
    commands: list[list[str]]  # what follows "python"

    def done(self) -> bool:
        return (self.folder / "eval" / "results.json").exists()


def check_settings(args, names: tuple[str, ...]):
    """Write down what OUT is made with, or refuse to add runs made with anything else to it."""
    asked = {name: str(getattr(args, name)) for name in names}
    path = args.out / "settings.json"
    made = json.loads(path.read_text()) if path.exists() else asked
    differ = [
        f"--{name} {made[name]}, not {asked[name]}" for name in asked if made[name] != asked[name]
    ]
    if differ:
        raise SystemExit(
            f"error: the runs in {args.out} are made with {', '.join(differ)}; "
            "give this table its own --out"
        )
    path.write_text(json.dumps(made, indent=1))


def say_what_is_to_do(jobs: list[Job], at_once: int):
    left = [job.folder.name for job in jobs if not job.done()]
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already", flush=True)
    if left:
        print(f"to do, {at_once} at a time: {', '.join(left)}", flush=True)


def run_all(jobs: list[Job], at_once: int):
    """Do what is not done yet. SystemExit where a command fails."""
    threads = max(1, (os.cpu_count() or 1) // at_once)
    left = [job for job in jobs if not job.done()]
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda job: run(job, threads), left))  # list: raise what a job raised


def run(job: Job, threads: int):
    """Its commands write to the folder's log.txt."""
    job.folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    for command in job.commands:
        with open(job.folder / "log.txt", "a") as log:
            ended = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )
        if ended.returncode:
            log = job.folder / "log.txt"
            raise SystemExit(f"error: {' '.join(command)} failed; {log} says why")
    print(f"{job.folder.name}: done in {(time.time() - started) / 60:.1f} minutes", flush=True)


def train_command(args, folder: Path, seed: int, flags: str) -> list[str]:
    """Of a row's flags; it is evaluated before its first step and after its last one only."""
    common = {
        "--kb": args.kb,
        "--data": args.data,
        "--init": args.init,
        "--out": folder,
        "--seed": seed,
        "--steps": args.steps,
        "--max-minutes": 0,
        "--eval-every": args.steps,
        "--eval-questions": 50,
        "--save-every": 20,
        "--keep": 1,
    }
    if args.limit:
        common["--limit"] = args.limit
    return ["train.py", *words(common), "--resume", *flags.split()]


def words(flags: dict) -> list[str]:
    return [str(word) for pair in flags.items() for word in pair]


def seeds_there(out: Path, row: str) -> list[int]:
    """The seeds with which a row is trained and evaluated."""
    folders = [path.parent.parent.name for path in out.glob(f"{row}-*/eval/results.json")]
    seeds = [name.removeprefix(f"{row}-") for name in folders]
    return sorted(int(seed) for seed in seeds if seed.isdigit())
