"""Two settings that everybody asks about, as a table each, with where they break.

    python -m evaluation.sweep group-size        # 1, 2, 4, 8, 16 responses per question
    python -m evaluation.sweep learning-rate     # times optimizer steps per step
    python -m evaluation.sweep group-size --table        # only print what is there

All rows train as many steps on as many sampled responses. Accuracies are those of the validation
questions: a setting is chosen by them, and the test questions stay unseen. Resumable.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from config import PRESETS
from evaluation.plot import read_metrics
from evaluation.runs import (
    Job,
    check_settings,
    run_all,
    say_what_is_to_do,
    seeds_there,
    train_command,
    words,
)

RESPONSES = 128  # per step, of every row
COLUMNS = {  # key of a row's figures: (column, format)
    "sampled": ("sampled %", "{:.1f}"),
    "greedy": ("greedy %", "{:.1f}"),
    "format_rate": ("format", "{:.3f}"),
    "tool_calls": ("searches", "{:.2f}"),
    "clip_fraction": ("clipped", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "groups_kept": ("groups kept", "{:.0%}"),
    "seconds": ("s / step", "{:.1f}"),
}


class Row(NamedTuple):
    label: str
    flags: str
    questions: int = 16  # per step


def group_sizes() -> dict[str, Row]:
    rows = {}
    for size in (1, 2, 4, 8, 16):
        questions = RESPONSES // size
        flags = f"--group-size {size} --questions-per-step {questions}"
        if size == 1:  # its baseline is the mean of the step's rewards
            flags += " --no-dynamic-sampling"
        rows[f"G{size}"] = Row(f"{size} × {questions} questions", flags, questions)
    return rows


def learning_rates() -> dict[str, Row]:
    rows = {}
    for updates in (1, 2, 4):
        for lr in ("2.5e-5", "5e-5", "1e-4", "2e-4", "4e-4"):
            flags = f"--lr {lr} --updates-per-step {updates}"
            flags += " --max-bad-steps 1000"  # a row that breaks is shown, it does not stop
            rows[f"lr{lr}x{updates}"] = Row(f"lr {lr}, {updates} per step", flags)
    return rows


SWEEPS = {"group-size": group_sizes(), "learning-rate": learning_rates()}


@dataclass
class Args:
    """Train and evaluate the rows of a table, one per value of a setting."""

    setting: Positional[Literal["group-size", "learning-rate"]]  # which table
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
    commands = [
        train_command(args, folder, seed, SWEEPS[args.setting][name].flags),
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
    shown = Table(title=f"{args.setting}: validation questions, {RESPONSES} responses per step")
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
            **{key: round(value, 5) for key, value in figures.items()},
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
    return out


def figures_of(folder: Path, row: Row) -> dict:
    """What a run's log and its two evaluations say."""
    sampled = json.loads((folder / "eval" / "results.json").read_text())
    greedy = json.loads((folder / "eval-greedy" / "results.json").read_text())
    steps = read_metrics(folder).training

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "sampled": sampled["overall"],
        "greedy": greedy["overall"],
        "format_rate": sampled["format_rate"],
        "tool_calls": sampled["tool_calls_mean"],
        "clip_fraction": mean([step["clip_fraction"] for step in steps]),
        "entropy": mean([step["entropy"] for step in steps[-5:]]),  # what is left of it
        "groups_kept": mean([step["groups_kept"] for step in steps]) / row.questions,
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
