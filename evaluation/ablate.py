"""The paper's ablations and baselines on the built-in benchmark: which part does what?

    python -m evaluation.ablate                          # all variants, three seeds; resumable
    python -m evaluation.ablate --rows full no_action --seeds 0 1
    python -m evaluation.ablate --rows no_action --seeds 3 4      # more seeds for one row
    python -m evaluation.ablate --table                  # only print what is there
    python -m evaluation.ablate --rows full no_action neither --limit 600 \\
        --init runs/remembers --out runs/half-known      # see tiny/warmstart.py

A variant, a row of the table, is a run of `train.py` with one flag changed, then an evaluation of
its last checkpoint on the test split, sampled at temperature 1. Nothing is chosen by looking at the
test split: every setting was chosen on the validation split, for the full method.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from config import PRESETS
from evaluation.runs import (
    Job,
    check_settings,
    run_all,
    say_what_is_to_do,
    seeds_there,
    train_command,
    words,
)
from evaluation.summary import mean, percent, read_results


@dataclass(frozen=True)
class Variant:
    label: str
    train_flags: str | None = ""  # None: nothing is trained, the full method's policy is evaluated
    eval_flags: str = ""
    # [P] accuracy of the 7B policy, on other questions, where the paper makes the same comparison:
    # the table asks whether our change against the full method has the sign of theirs
    paper_bridge: float | None = None
    paper_compare: float | None = None
    paper_system: str = ""  # where the paper compares with another system: its name, and no sign


VARIANTS = {
    "full": Variant("full method", paper_bridge=51.35, paper_compare=22.01),
    # the reward
    "no_action": Variant("without R_action", "--gamma 0", paper_bridge=47.57, paper_compare=20.62),
    "no_format": Variant("without R_format", "--beta 0", paper_compare=14.42),
    "neither": Variant(
        "without both", "--beta 0 --gamma 0", paper_bridge=41.75, paper_compare=13.03
    ),
    "ungated": Variant("R_action not gated", "--no-gate-action"),
    # the loss
    "no_mask": Variant("retrieved tokens in the loss", "--no-mask-retrieved --recompute-logprobs"),
    "symmetric": Variant("symmetric clip, 0.2", "--eps-high 0.2"),
    "no_refill": Variant("dropped groups not replaced", "--max-refills 0"),
    "no_filter": Variant("no dynamic sampling", "--no-dynamic-sampling"),
    "sequence": Variant("sequence-level loss", "--no-token-level-loss"),
    # how many turns may search
    "T1": Variant("T = 1", "--max-turns 1"),
    "T2": Variant("T = 2", "--max-turns 2", paper_bridge=39.93),
    "T3": Variant("T = 3", "--max-turns 3"),
    "T5": Variant("T = 5", "--max-turns 5"),
    # how many passages a search returns; an observation has 42 tokens of room for each
    "k1": Variant("top-1", "--topk 1 --max-obs-tokens 42 --max-tokens 1200"),
    "k3": Variant("top-3, with room for them", "--topk 3 --max-obs-tokens 126 --max-tokens 1200"),
    "k4": Variant("top-4, with room for them", "--topk 4 --max-obs-tokens 168 --max-tokens 1200"),
    "k5": Variant("top-5, with room for them", "--topk 5 --max-obs-tokens 210 --max-tokens 1200"),
    # Nothing is trained: the policy that training started from, or the full method's, used as
    # earlier systems would use it (evaluation/baselines.py). In the paper these are other models.
    "before": Variant("before RL", None, "--ckpt INIT"),
    "prompted": Variant(
        "before RL, prompted",
        None,
        "--ckpt INIT --mode prompted",
        paper_system="OmniSearch, GPT-4o",
    ),
    "direct": Variant("no tools", None, "--mode direct", paper_system="Qwen2.5-VL-72B"),
    "text_only": Variant(
        "text search alone, blind", None, "--mode text-only", paper_system="Search-R1, trained"
    ),
    "static": Variant("fixed pipeline", None, "--mode static"),
}


@dataclass
class Args:
    """Train and evaluate the variants of the ablation table, one per row."""

    # fmt: off
    rows: tuple[str, ...] = tuple(VARIANTS)  # in this order
    seeds: tuple[int, ...] = (0, 1, 2)  # of the runs to do; the table takes all that are there
    steps: int = 40                   # the same for every variant
    kb: Path = Path("data/kb")
    data: Path = Path("data/mmhops")
    init: str = PRESETS["tiny"].init  # what training starts from
    limit: int | None = None          # train on this many questions only
    out: Path = Path("runs/ablate")
    jobs: int = 2                     # runs at a time, each with its share of the cores
    wide: float = 2.0                 # name the rows whose interval on Bridge is wider than ± this
    table: bool = False               # train nothing
    # fmt: on


def main(args: Args):
    unknown = set(args.rows) - set(VARIANTS)
    if unknown:
        raise SystemExit(
            f"error: no row is called {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        check_settings(args, ("kb", "data", "init", "limit", "steps"))
        trained, untrained = jobs_of(args)
        say_what_is_to_do(trained + untrained, args.jobs)
        run_all(trained, args.jobs)
        run_all(untrained, args.jobs)  # they need the full method's policy
    print(wide_rows(table(args), args.wide))


# ------------------------------------------------------------------------------------ the runs


def jobs_of(args: Args) -> tuple[list[Job], list[Job]]:
    """(those that train, those that evaluate the full method's policy), the full method first."""
    names = list(dict.fromkeys(["full", *args.rows]))
    trained = [name for name in names if VARIANTS[name].train_flags is not None]
    untrained = [name for name in names if VARIANTS[name].train_flags is None]
    return tuple(
        [job(args, name, seed) for seed in args.seeds for name in some]
        for some in (trained, untrained)
    )


def job(args: Args, name: str, seed: int) -> Job:
    """Train and evaluate a variant."""
    folder = args.out / f"{name}-{seed}"
    commands = [evaluate_command(args, name, seed)]
    flags = VARIANTS[name].train_flags
    if flags is not None:
        commands.insert(0, train_command(args, folder, seed, flags))
    return Job(folder, commands)


def evaluate_command(args: Args, name: str, seed: int) -> list[str]:
    variant = VARIANTS[name]
    policy = "full" if variant.train_flags is None else name
    flags = {
        "--ckpt": args.out / f"{policy}-{seed}" / "latest",
        "--kb": args.kb,
        "--data": args.data,
        "--temperature": 1,
        "--seed": seed,
        "--traces": 0,
        "--out": args.out / f"{name}-{seed}" / "eval",
    }
    own = [args.init if word == "INIT" else word for word in variant.eval_flags.split()]
    return ["evaluate.py", *words(flags), *own]  # of a flag given twice the last counts


# ------------------------------------------------------------------------------------ the table


@dataclass
class Accuracies:
    """Of a variant's seeds that are there; the questions in the same order for every seed."""

    seeds: list[int]
    bridge: np.ndarray  # (seeds, questions): share of right responses
    compare: np.ndarray  # (seeds, questions)


def table(args: Args) -> dict:
    """Print the table; returns it as {variant: figures}, and writes it to OUT/table.json."""
    full = accuracies(args, "full")
    out, shown = {}, empty_table()
    for name in args.rows:
        values = accuracies(args, name)
        if values is None:
            continue
        # 1) what this variant's evaluations say
        results = [
            json.loads((args.out / f"{name}-{seed}" / "eval" / "results.json").read_text())
            for seed in values.seeds
        ]
        shared = shared_seeds(full, values)
        figures = {
            "seeds": values.seeds,
            "seeds_compared": shared,
            "format_rate": mean([result["format_rate"] for result in results], 4),
            "tool_calls": mean([result["tool_calls_mean"] for result in results], 3),
        }
        # 2) its accuracies, against the full method's and against the paper's change
        cells = []
        for split in ("bridge", "compare"):
            figures[split] = percent(getattr(values, split))
            ours = None if name == "full" else change_from(full, values, split)
            theirs = paper_change(name, split)
            figures |= change_figures(split, ours, theirs)
            cells += [f"{figures[split]:.1f}", *change_cells(ours, theirs)]
            if split == "bridge":
                cells[-1] = cells[-1] or VARIANTS[name].paper_system
        # 3) a row of the table
        out[name] = figures
        shown.add_row(
            VARIANTS[name].label,
            seeds_cell(values.seeds, shared),
            *cells,
            f"{figures['format_rate']:.3f}",
            f"{figures['tool_calls']:.2f}",
            style="bold" if name == "full" else None,
        )
    Console(width=140).print(shown)
    (args.out / "table.json").write_text(json.dumps(out, indent=1))
    return out


def seeds_cell(seeds: list[int], compared: list[int]) -> str:
    """The number of seeds; and of those of the comparison, where the full method has not all.

    >>> seeds_cell([0, 1, 2], [0, 1, 2]), seeds_cell([0, 1, 2], [0, 1])
    ('3', '3 (2)')
    """
    return str(len(seeds)) + (f" ({len(compared)})" if compared != seeds else "")


def wide_rows(figures: dict, points: float) -> str:
    """Which rows of a table need more seeds, and how to add two.

    >>> rows = {"a": [1.0, -2.0, 4.0], "b": [1.0, 0.0, 2.0]}
    >>> wide_rows({n: {"bridge_change": c, "seeds": [0, 1]} for n, c in rows.items()}, 2.0)
    'interval on Bridge wider than ±2 points: a; add seeds with --rows a --seeds 2 3'
    """
    wide = [name for name in figures if half_width(figures[name]) > points]
    if not wide:
        return f"no row's interval on Bridge is wider than ±{points:g} points"
    following = 1 + max(seed for name in wide for seed in figures[name]["seeds"])
    return (
        f"interval on Bridge wider than ±{points:g} points: {', '.join(wide)}; "
        f"add seeds with --rows {' '.join(wide)} --seeds {following} {following + 1}"
    )


def half_width(figures: dict) -> float:
    """Of the interval of a row's change on Bridge; 0 where there is none."""
    _, low, high = figures.get("bridge_change", (0, 0, 0))
    return (high - low) / 2


def empty_table() -> Table:
    shown = Table(
        title="sampled test accuracy in %, mean of seeds; change against the full method, "
        "95% interval",
        caption="seeds: in brackets those of the comparison, where it has fewer",
    )
    shown.add_column("")
    shown.add_column("seeds", justify="right")
    for split in ("Bridge", "Compare"):
        for column in (split, "change", "paper"):
            shown.add_column(column, justify="right")
    for column in ("format", "searches"):
        shown.add_column(column, justify="right")
    return shown


def accuracies(args: Args, name: str) -> Accuracies | None:
    """A variant's accuracies; None where no seed has been evaluated yet."""
    seeds = seeds_there(args.out, name)
    results = {seed: read_results(args.out / f"{name}-{seed}" / "eval") for seed in seeds}
    if not results:
        return None
    order = sorted(next(iter(results.values())))  # question ids

    def of(row: str) -> np.ndarray:
        return np.array(
            [
                [np.mean(result[q]["right"]) for q in order if row in result[q]["rows"]]
                for result in results.values()
            ]
        )

    return Accuracies(list(results), of("bridge"), of("compare"))


Change = tuple[float, float, float]  # in points: its mean and its 95% interval


def shared_seeds(full: Accuracies | None, other: Accuracies) -> list[int]:
    return [seed for seed in other.seeds if full and seed in full.seeds]


def change_from(full: Accuracies | None, other: Accuracies, split: str) -> Change | None:
    """The change from the full method, over the seeds that both have; None where there is none."""
    shared = shared_seeds(full, other)
    if not shared:
        return None
    before, after = (
        getattr(side, split)[[side.seeds.index(seed) for seed in shared]] for side in (full, other)
    )
    return change(before, after)


def change(full: np.ndarray, other: np.ndarray, draws: int = 2000) -> Change:
    """Mean of other - full; both (seeds, questions), the same seeds and questions.

    The interval is a two-level bootstrap: seeds are drawn, then questions.
    """
    difference = other - full
    seeds, questions = difference.shape
    rng = np.random.default_rng(0)
    means = []
    for _ in range(draws):
        drawn = difference[rng.integers(seeds, size=seeds)]
        means.append(drawn[:, rng.integers(questions, size=questions)].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * difference.mean(), 100 * low, 100 * high


def paper_change(name: str, split: str) -> float | None:
    """What the paper reports for a variant, against the paper's full method; in points."""
    theirs = getattr(VARIANTS[name], f"paper_{split}")
    return None if theirs is None else theirs - getattr(VARIANTS["full"], f"paper_{split}")


def signs(ours: Change, theirs: float) -> tuple[bool, bool]:
    """(does our change have the sign of theirs, does our interval leave 0 out)."""
    middle, low, high = ours
    return bool(middle * theirs > 0), bool(low * high > 0)


def change_figures(split: str, ours: Change | None, theirs: float | None) -> dict:
    """What table.json says of a change."""
    if ours is None:
        return {}
    figures = {f"{split}_change": [round(x, 2) for x in ours]}
    if theirs is not None:
        agrees, decided = signs(ours, theirs)
        figures[f"{split}_paper"] = round(theirs, 2)
        figures[f"{split}_sign_agrees"] = agrees
        figures[f"{split}_sign_decided"] = decided
    return figures


def change_cells(ours: Change | None, theirs: float | None) -> list[str]:
    """Our change, and the paper's: ✓ ours has its sign, ✗ it has not, ? our interval contains 0."""
    if ours is None:
        return ["", ""]
    cell = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*ours)
    if theirs is None:
        return [cell, ""]
    agrees, decided = signs(ours, theirs)
    verdict = ("✓" if agrees else "✗") if decided else "?"
    return [cell, f"{theirs:+.1f} {verdict}"]


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
