"""A run killed again and again ends with the figures of the run that was not.

    python benchmarks/kills.py --kills 20          # about ten minutes on two cores; needs `make data` once

Trains a short run undisturbed, then the same run with SIGKILL at random moments: while loading, inside a rollout, an update, an
evaluation, the writing of a checkpoint. Each time it goes on with --resume. At the end every line of metrics.jsonl must
be the same, timings aside, and so must the weights.
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
    launcher = (
        [sys.executable]
        if args.ranks == 1
        else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(args.ranks)]
    )
    return [
        *launcher,
        "train.py",
        "--out",
        str(out),
        "--steps",
        str(args.steps),
        "--questions-per-step",
        "8",
        "--group-size",
        "4",
        "--max-refills",
        "1",
        "--eval-every",
        "4",
        "--eval-questions",
        "8",
        "--save-every",
        "1",
        "--max-minutes",
        "0",
        "--resume",
    ]


def start(args: Args, out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(args, out),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def result(out: Path) -> tuple[list, str]:
    """(records without timings, digest of the weights)."""
    records = [
        {k: v for k, v in json.loads(line).items() if k not in TIMED}
        for line in open(out / "metrics.jsonl")
    ]
    return records, hashlib.sha256((out / "latest" / "model.safetensors").read_bytes()).hexdigest()


def main(args: Args):
    rng, whole, cut = random.Random(args.seed), ROOT / args.out / "whole", ROOT / args.out / "cut"
    shutil.rmtree(ROOT / args.out, ignore_errors=True)
    began = time.time()
    process = start(args, whole)
    while not (whole / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    loading = time.time() - began
    assert process.wait() == 0, process.stderr.read()[-2000:]
    undisturbed, killed = time.time() - began, 0
    while True:
        process, began = start(args, cut), time.time()
        moment = (
            loading
            + rng.uniform(
                -0.3 * loading, 0.3 * loading + 1.5 * (undisturbed - loading) / args.kills
            )
            if killed < args.kills
            else None
        )
        try:
            assert process.wait(moment) == 0, process.stderr.read()[-2000:]
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            folders = sorted(p.name for p in cut.glob("*step-*")) if cut.exists() else []
            print(
                f"kill {killed}: after {time.time() - began:.1f} s, {' '.join(folders) or 'nothing written yet'}",
                flush=True,
            )
    same = result(whole) == result(cut)
    print(
        f"{killed} kills; {len(result(whole)[0])} records and the weights are {'identical' if same else 'DIFFERENT'} (undisturbed {undisturbed:.0f} s)"
    )
    sys.exit(not same)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
