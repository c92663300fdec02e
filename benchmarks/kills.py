"""A run killed again and again ends with the figures of the run that was not.

    python benchmarks/kills.py --kills 20   # about ten minutes on two cores; needs `make data`

Trains a short run undisturbed, then the same run with SIGKILL at random moments: while loading,
inside a rollout, an update, an evaluation, the writing of a checkpoint. Each time it goes on with
--resume. At the end every line of metrics.jsonl must be the same, timings aside, and so must the
weights.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMED = {
    "seconds_rollout",
    "seconds_search",
    "seconds_train",
    "tokens_per_second",
    "eval_seconds",
    "mfu",
}


@dataclass
class Args:
    """Kill a training run at random moments and compare it with one that was left alone."""

    kills: int = 20
    steps: int = 16
    ranks: int = 1
    out: Path = Path("runs/kills")
    seed: int = 0


def command(args: Args, out: Path) -> list[str]:
    """A short run: every step is saved, every fourth is evaluated."""
    launcher = [sys.executable]
    if args.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(args.ranks)]
    settings = {
        "--out": out,
        "--steps": args.steps,
        "--questions-per-step": 8,
        "--group-size": 4,
        "--max-refills": 1,
        "--eval-every": 4,
        "--eval-questions": 8,
        "--save-every": 1,
        "--max-minutes": 0,
    }
    flags = [str(word) for setting in settings.items() for word in setting]
    return [*launcher, "train.py", *flags, "--resume"]


def start(args: Args, out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(args, out),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a group of its own, so that all ranks can be killed at once
        text=True,
    )


def wait(process: subprocess.Popen, seconds: float | None = None):
    """Until it ends well. Raises TimeoutExpired when it has not ended by then."""
    assert process.wait(seconds) == 0, process.stderr.read()[-2000:]


def result(out: Path) -> tuple[list, str]:
    """(records without timings, digest of the weights)."""
    records = []
    with open(out / "metrics.jsonl") as file:
        for line in file:
            record = json.loads(line)
            records.append({name: record[name] for name in record if name not in TIMED})
    weights = (out / "latest" / "model.safetensors").read_bytes()
    return records, hashlib.sha256(weights).hexdigest()


def run_whole(args: Args, out: Path) -> tuple[float, float]:
    """(seconds of the run, seconds until its log appeared), undisturbed."""
    began = time.time()
    process = start(args, out)
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    loading = time.time() - began
    wait(process)
    return time.time() - began, loading


def run_killed(args: Args, out: Path, seconds: float, loading: float) -> int:
    """Start the run, kill it, resume it, kill it …; returns the number of kills. seconds and
    loading are those of the run that was left alone: the moments are drawn so that kills fall on
    all of it."""
    rng = random.Random(args.seed)
    earliest = 0.7 * loading
    latest = 1.3 * loading + 1.5 * (seconds - loading) / max(1, args.kills)
    killed = 0
    while True:
        process = start(args, out)
        began = time.time()
        moment = rng.uniform(earliest, latest) if killed < args.kills else None
        try:
            wait(process, moment)
            return killed
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        killed += 1
        folders = sorted(path.name for path in out.glob("*step-*"))
        print(
            f"kill {killed}: after {time.time() - began:.1f} s, "
            f"{' '.join(folders) or 'nothing written yet'}",
            flush=True,
        )


def main(args: Args):
    whole = ROOT / args.out / "whole"
    cut = ROOT / args.out / "cut"
    shutil.rmtree(ROOT / args.out, ignore_errors=True)
    seconds, loading = run_whole(args, whole)
    killed = run_killed(args, cut, seconds, loading)
    same = result(whole) == result(cut)
    print(
        f"{killed} kills; {len(result(whole)[0])} records and the weights are "
        f"{'identical' if same else 'DIFFERENT'} (undisturbed {seconds:.0f} s)"
    )
    sys.exit(not same)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
