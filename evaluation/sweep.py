"""Settings that everybody asks about, as a table and a picture each, with where they break.

    python -m evaluation.sweep group-size        # 1, 2, 4, 8, 16 responses per question
    python -m evaluation.sweep learning-rate     # times optimizer steps per step
    python -m evaluation.sweep dtype             # bfloat16, and what corrects its log-probabilities
    python -m evaluation.sweep group-size --table        # only print and draw what is there

All rows train as many steps on as many sampled responses. Accuracies are those of the validation
questions: a setting is chosen by them, and the test questions stay unseen. Resumable.
"""

import json
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from config import PRESETS
from evaluation.plot import COLORS, read_metrics, save
from evaluation.runs import (
    Job,
    check_settings,
    run_all,
    say_what_is_to_do,
    seeds_there,
    train_command,
    words,
)

RESPONSES = 128  # per step, of every row but those of dtype
COLUMNS = {  # key of a row's figures: (column, format)
    "sampled": ("sampled %", "{:.1f}"),
    "greedy": ("greedy %", "{:.1f}"),
    "format_rate": ("format", "{:.3f}"),
    "tool_calls": ("searches", "{:.2f}"),
    "clip_fraction": ("clipped", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "groups_kept": ("groups kept", "{:.0%}"),
    "difference": ("rollout − training", "{:.1e}"),
    "seconds": ("s / step", "{:.1f}"),
}


class Row(NamedTuple):
    label: str
    flags: str
    questions: int = 16  # per step
    launcher: str = ""  # what starts train.py, where that is not python


def group_sizes() -> dict[str, Row]:
    rows = {}
    for size in (1, 2, 4, 8, 16):
        questions = RESPONSES // size
        # dropped groups are not replaced: as many sampled tokens in every row
        flags = f"--group-size {size} --questions-per-step {questions} --max-refills 0"
        if size == 1:  # its baseline is the mean of the step's rewards
            flags += " --no-dynamic-sampling"
        rows[f"G{size}"] = Row(f"{size} × {questions} questions", flags, questions)
    return rows


def learning_rates() -> dict[str, Row]:
    rows = {}
    for updates in (1, 2, 4):
        for lr in ("2.5e-5", "5e-5", "1e-4", "2e-4", "4e-4"):
            flags = f"--lr {lr} --updates-per-step {updates} --max-refills 0"
            flags += " --max-bad-steps 1000"  # a row that breaks is shown, it does not stop
            rows[f"lr{lr}x{updates}"] = Row(f"lr {lr}, {updates} per step", flags)
    return rows


def dtypes() -> dict[str, Row]:
    # Mixed precision is FSDP's, so all rows are a group of one rank. A CPU without bfloat16 takes
    # four times as long for it: a quarter of the questions.
    alone = "-m torch.distributed.run --standalone --nproc_per_node 1"
    flags = {
        "float32": ("float32", "--dtype float32"),
        "bfloat16": ("bfloat16", "--dtype bfloat16"),
        "rescored": ("bfloat16, recomputed", "--dtype bfloat16 --recompute-logprobs"),
        "weighted": (
            "bfloat16, recomputed, truncated weights",
            "--dtype bfloat16 --recompute-logprobs --max-rollout-ratio 2",
        ),
    }
    return {
        name: Row(label, f"{some} --questions-per-step 4 --max-refills 0", 4, alone)
        for name, (label, some) in flags.items()
    }


SWEEPS = {"group-size": group_sizes(), "learning-rate": learning_rates(), "dtype": dtypes()}


@dataclass
class Args:
    """Train and evaluate the rows of a table, one per value of a setting."""

    setting: Positional[Literal["group-size", "learning-rate", "dtype"]]  # which table
    # fmt: off
    rows: tuple[str, ...] = ()        # e.g. G8, or lr5e-5x2; none named: all
    seeds: tuple[int, ...] = (0,)     # of the runs to do; the table takes all that are there
    steps: int = 40                   # the same for every row
    kb: Path = Path("data/kb")
    data: Path = Path("data/mmhops")
    init: str = PRESETS["tiny"].init  # what training starts from
    limit: int | None = None          # train and evaluate with this many questions only
    out: Path | None = None           # by default runs/SETTING
    jobs: int = 2                     # runs at a time, each with its share of the cores
    table: bool = False               # train nothing
    # fmt: on


def main(args: Args):
    rows = SWEEPS[args.setting]
    unknown = set(args.rows) - set(rows)
    if unknown:
        raise SystemExit(
            f"error: no row is called {', '.join(sorted(unknown))}; there are {', '.join(rows)}"
        )
    names = args.rows or tuple(rows)
    args.out = args.out or Path("runs") / args.setting
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        check_settings(args, ("setting", "kb", "data", "init", "limit", "steps"))
        jobs = [job(args, name, seed) for seed in args.seeds for name in names]
        say_what_is_to_do(jobs, args.jobs)
        run_all(jobs, args.jobs)
    table(args, names)


def job(args: Args, name: str, seed: int) -> Job:
    """Train, and evaluate greedily and sampled."""
    folder = args.out / f"{name}-{seed}"
    row = SWEEPS[args.setting][name]
    commands = [
        [*row.launcher.split(), *train_command(args, folder, seed, row.flags)],
        evaluate_command(args, folder, seed, 0, "eval-greedy"),
        evaluate_command(args, folder, seed, 1, "eval"),  # the last one: with it a job is done
    ]
    return Job(folder, commands)


def evaluate_command(args: Args, folder: Path, seed: int, temperature: int, out: str) -> list[str]:
    flags = {
        "--ckpt": folder / "latest",
        "--kb": args.kb,
        "--data": args.data,
        "--split": "validation",
        "--temperature": temperature,
        "--seed": seed,
        "--traces": 0,
        "--out": folder / out,
    }
    if args.limit:
        flags["--limit"] = args.limit
    return ["evaluate.py", *words(flags)]


# ------------------------------------------------------------------------------------ the table


def table(args: Args, names: tuple[str, ...]) -> dict:
    """Print the table; returns it as {row: figures}, means over seeds; writes OUT/table.json."""
    shown = Table(title=f"{args.setting}, after {args.steps} steps: validation questions")
    shown.add_column("")
    shown.add_column("seeds", justify="right")
    for column, _ in COLUMNS.values():
        shown.add_column(column, justify="right")
    shown.add_column("falls after step")
    out = {}
    for name in names:
        row, seeds = SWEEPS[args.setting][name], seeds_there(args.out, name)
        if not seeds:
            continue
        runs = [figures_of(args.out / f"{name}-{seed}", row) for seed in seeds]
        figures = {key: sum(run[key] for run in runs) / len(runs) for key in COLUMNS}
        falls = [run["falls_after"] for run in runs]
        out[name] = {
            "seeds": seeds,
            **{key: float(f"{value:.5g}") for key, value in figures.items()},
            "updates_skipped": sum(run["updates_skipped"] for run in runs),
            "falls_after": falls,
        }
        cells = [form.format(figures[key]) for key, (_, form) in COLUMNS.items()]
        broken = [step for step in falls if step is not None]
        shown.add_row(
            row.label,
            str(len(seeds)),
            *cells,
            ", ".join(str(step) for step in broken),
            style="red" if broken else None,
        )
    Console(width=140).print(shown)
    (args.out / "table.json").write_text(json.dumps(out, indent=1))
    if out:
        draw(args, out)
    return out


def draw(args: Args, made: dict):
    """OUT/curves.png: each row's training, its seeds' mean and all that lies between them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "outcome_mean": "right answers, training questions (mean of 5 steps)",
        "logprob_diff_mean": "rollout − training, mean |Δ log-prob|",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 4), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items()):
        for color, (name, row) in zip(cycle(COLORS), made.items()):
            runs = [args.out / f"{name}-{seed}" for seed in row["seeds"]]
            curves = [[step[key] for step in read_metrics(run).training] for run in runs]
            if key == "outcome_mean":
                curves = [running_mean(curve) for curve in curves]
            steps = range(1, min(map(len, curves)) + 1)
            values = np.array(list(zip(*curves)))  # (steps, seeds)
            # where no group was kept there is no difference
            values = values if key == "outcome_mean" else np.where(values > 0, values, np.nan)
            label = SWEEPS[args.setting][name].label
            axis.plot(steps, np.nanmean(values, 1), color=color, label=label)
            lowest, highest = np.nanmin(values, 1), np.nanmax(values, 1)
            axis.fill_between(steps, lowest, highest, color=color, alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=9)
    save(figure, args.out / "curves.png")


def running_mean(values: list[float], window: int = 5) -> list[float]:
    """Of each value and those before it, `window` at most.

    >>> running_mean([1.0, 3.0, 5.0], window=2)
    [1.0, 2.0, 4.0]
    """
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def figures_of(folder: Path, row: Row) -> dict:
    """What a run's log and its two evaluations say."""
    sampled = json.loads((folder / "eval" / "results.json").read_text())
    greedy = json.loads((folder / "eval-greedy" / "results.json").read_text())
    steps = read_metrics(folder).training
    trained = [step for step in steps if step["groups_kept"]] or steps  # others measure nothing

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "sampled": sampled["overall"],
        "greedy": greedy["overall"],
        "format_rate": sampled["format_rate"],
        "tool_calls": sampled["tool_calls_mean"],
        "clip_fraction": mean([step["clip_fraction"] for step in trained]),
        "entropy": mean([step["entropy"] for step in trained[-5:]]),  # what is left of it
        "groups_kept": mean([step["groups_kept"] for step in steps]) / row.questions,
        "difference": mean([step["logprob_diff_mean"] for step in trained]),
        "seconds": mean([step["seconds_rollout"] + step["seconds_train"] for step in steps]),
        "updates_skipped": sum(step["updates_skipped"] for step in steps),
        "falls_after": falls_after([step["outcome_mean"] for step in steps]),
    }


def falls_after(accuracies: list[float], window: int = 5, loss: float = 0.15) -> int | None:
    """Where a run breaks: the step after which its accuracy falls, not to recover.

    That is the last step of its best `window` steps, if its last ones are worse by `loss`. None
    where a run ends about as well as it ever was.

    >>> falls_after([0.5, 0.7, 0.8, 0.4, 0.1], window=2), falls_after([0.5, 0.7, 0.8], window=2)
    (3, None)
    """
    means = [
        sum(accuracies[end - window : end]) / window for end in range(window, len(accuracies) + 1)
    ]
    if not means or max(means) - means[-1] < loss:
        return None
    return means.index(max(means)) + window


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
