"""A long run: does memory grow, do open files, does a step get slower?

    python -m benchmarks.soak                  # 2,000 steps of a shortened tiny preset
    python -m benchmarks.soak --out runs/soak --report     # only measure what a run left

Runs `train.py`, and looks at its process after every step that it logs. Writes OUT/soak.jsonl,
OUT/soak.json (slopes) and OUT/soak.png. Linux alone: it reads /proc and asks glibc.
"""

import ctypes
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train
from files.records import read_lines

# Few and short responses: a step takes part of a second, and passes through every part. The policy
# hardly changes (lr): one that learned would write more or less, and a step take more or less time.
# Few questions (limit): what is remembered of pictures and queries soon stops to grow.
FLAGS = """
    --max-minutes 0 --lr 1e-8 --limit 64 --questions-per-step 2 --group-size 2 --updates-per-step 1
    --max-turns 2 --max-turn-tokens 32 --max-obs-tokens 48 --max-tokens 300 --no-dynamic-sampling
    --eval-every 50 --eval-questions 8 --save-every 100
"""
MOST_GROWTH = 1.0  # MiB per 100 steps
MIB = 2**20


@dataclass
class Args:
    """Run for long, and say what grew."""

    steps: int = 2000
    out: Path = Path("runs/soak")
    report: bool = False  # run nothing


def watch(args: Args):
    """Run train.py here; a line of OUT/soak.jsonl for each step that it logs."""
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "soak.jsonl", "w", buffering=1) as lines:

        def open_log(cfg):
            log = progress_log(cfg)

            def logged(record: dict):
                log(record)
                if "loss" in record:
                    lines.write(json.dumps({"step": record["step"]} | figures()) + "\n")

            return logged

        progress_log, train.open_log = train.open_log, open_log
        command = f"train.py tiny {FLAGS} --steps {args.steps} --out {args.out}"
        sys.argv = command.split()
        train.main()


def figures() -> dict:
    """Of this process: "resident" and "in use", MiB; open "files"; "threads".

    In use is what was asked for and not given back: by Python's objects (about 100 bytes per
    block), and by everything else through the C library. Resident is also what the C library keeps
    for the next who asks, and pages of files.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "resident": int(status["VmRSS"].split()[0]) * 1024 / MIB,
        "in use": (allocated() + 100 * sys.getallocatedblocks()) / MIB,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def allocated() -> int:
    """Bytes in use by the count of the C library, glibc; all of its arenas."""
    libc = ctypes.CDLL("libc.so.6")
    libc.open_memstream.restype = ctypes.c_void_p
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    totals = ctypes.string_at(text, size.value).decode().rpartition("</heap>")[2]
    libc.free(text)
    found = dict(re.findall(r'type="(\w+)"(?: count="\d+")? size="(\d+)"', totals))
    taken, mapped, fast, rest = (int(found[name]) for name in ("current", "mmap", "fast", "rest"))
    return taken + mapped - fast - rest


def slopes(lines: list[dict], seconds: np.ndarray) -> dict:
    """How much each figure changes per 100 steps, in the second half of the run.

    The first half is warming up: evaluations and their pictures are larger than a step, and what
    the allocator took for them it keeps. lines: what `watch` wrote. seconds (S,): of each step.
    """
    steps = np.array([line["step"] for line in lines])
    late = steps > steps[-1] / 2
    found = {"steps": int(steps[-1])}
    for name in ("resident", "in use", "files", "threads"):
        values = np.array([line[name] for line in lines])
        found[f"{name} per 100 steps"] = round(100 * np.polyfit(steps[late], values[late], 1)[0], 3)
        found[f"{name} at the end"] = round(float(values[-1]), 1)
    numbers = np.arange(1, len(seconds) + 1)
    after = numbers > len(numbers) / 2
    slope = np.polyfit(numbers[after], seconds[after], 1)[0]
    found["seconds per step, median"] = round(float(np.median(seconds)), 3)
    found["step time per 100 steps, %"] = round(100 * 100 * slope / np.median(seconds), 2)
    return found


def plot(lines: list[dict], seconds: np.ndarray, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [line["step"] for line in lines]
    panels = (
        ("memory in use, MiB", steps, [line["in use"] for line in lines]),
        ("resident memory, MiB", steps, [line["resident"] for line in lines]),
        ("open files", steps, [line["files"] for line in lines]),
        ("seconds per step", range(1, len(seconds) + 1), seconds),
    )
    figure, axes = plt.subplots(1, 4, figsize=(14, 2.8), layout="constrained")
    for axis, (title, x, y) in zip(axes, panels):
        axis.plot(x, y, linewidth=0.8, color="#1f5fa8")
        axis.set(title=title, xlabel="step", ylim=(0, 1.3 * np.percentile(y, 99.5)))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(args: Args):
    if not args.report:
        watch(args)
    lines = read_lines(args.out / "soak.jsonl")
    records = read_lines(args.out / "metrics.jsonl")
    seconds = np.array([r["seconds_rollout"] + r["seconds_train"] for r in records if "loss" in r])
    found = slopes(lines, seconds)
    found["memory"] = "PASS" if found["in use per 100 steps"] < MOST_GROWTH else "FAIL"
    (args.out / "soak.json").write_text(json.dumps(found, indent=1))
    plot(lines, seconds, args.out / "soak.png")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
