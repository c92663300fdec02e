"""The paper's ablations and baselines on the embedded benchmark: which part of the method does what?

    python -m evaluation.ablate                              # every row, three seeds; killed, it goes on where it stopped
    python -m evaluation.ablate --rows full no_action --seeds 0 1
    python -m evaluation.ablate --table                      # only print what is there
    python -m evaluation.ablate --rows full no_action neither --init runs/remembers --limit 600 --out runs/half-known   # see tiny/warmstart.py

A row is a run of `train.py` with one flag changed, then an evaluation of its last checkpoint on the test split, sampled at
temperature 1. The same seeds, questions and number of steps everywhere; nothing is chosen by looking at the test split. Every
setting was chosen on the validation split, for the full method. The last rows train nothing: they evaluate the full method's
policy as earlier systems would use it (evaluation/baselines.py), or the policy that training started from.

The interval of a difference is a two-level bootstrap: seeds are drawn, then questions. Where the paper reports a change (Bridge and
Compare of a 7B policy on other questions), the table says whether ours has its sign: ✓, ✗, or ? where our interval contains 0.
The paper's baselines are other models (without tools: Qwen2.5-VL-72B; text search alone: Search-R1 with a caption; prompted: OmniSearch
with GPT-4o); here it is the same policy, or the one it started from.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import PRESETS
from evaluation.summary import percent, read_results

ROOT = Path(__file__).parent.parent
# name: (what it is, flags of train.py or None to evaluate the full method's policy, flags of evaluate.py, the paper's change on Bridge, on Compare)
ROWS = {
    "full": ("full method", "", "", None, None),
    "no_action": ("without R_action", "--gamma 0", "", 47.57 - 51.35, 20.62 - 22.01),
    "no_format": ("without R_format", "--beta 0", "", None, 14.42 - 22.01),
    "neither": ("without both", "--beta 0 --gamma 0", "", 41.75 - 51.35, 13.03 - 22.01),
    "ungated": ("R_action not gated", "--no-gate-action", "", None, None),
    "no_mask": (
        "retrieved tokens in the loss",
        "--no-mask-retrieved --recompute-logprobs",
        "",
        None,
        None,
    ),
    "symmetric": ("symmetric clip, 0.2", "--eps-high 0.2", "", None, None),
    "no_filter": ("no dynamic sampling", "--no-dynamic-sampling", "", None, None),
    "sequence": ("sequence-level loss", "--no-token-level-loss", "", None, None),
    **{
        f"T{n}": (f"T = {n}", f"--max-turns {n}", "", 39.93 - 51.35 if n == 2 else None, None)
        for n in (1, 2, 3, 5)
    },
    **{
        f"k{n}": (
            f"top-{n}" + ", with room for them" * (n > 2),
            f"--topk {n} --max-obs-tokens {42 * n} --max-tokens 1200",
            "",
            None,
            None,
        )
        for n in (1, 3, 4, 5)
    },
    "before": ("before RL", None, "--ckpt INIT", None, None),
    "prompted": (
        "before RL, prompted",
        None,
        "--ckpt INIT --mode prompted",
        42.65 - 51.35,
        17.02 - 22.01,
    ),
    "direct": ("no tools", None, "--mode direct", 34.39 - 51.35, 7.59 - 22.01),
    "text_only": (
        "text search alone, blind",
        None,
        "--mode text-only",
        19.98 - 51.35,
        6.62 - 22.01,
    ),
    "static": ("fixed pipeline", None, "--mode static", None, None),
}


@dataclass
class Args:
    """Train and evaluate the rows of the ablation table."""

    rows: tuple[str, ...] = tuple(ROWS)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 40
    kb: Path = Path("data/kb")
    data: Path = Path("data/mmhops")
    init: str = PRESETS["tiny"].init  # what training starts from
    limit: int | None = None  # train on this many questions only
    out: Path = Path("runs/ablate")
    jobs: int = 2  # runs at a time, each with its share of the cores
    table: bool = False  # train nothing


def run(args: Args, name: str, seed: int):
    """Train and evaluate a row, where that is not done yet."""
    _, training, evaluation, *_ = ROWS[name]
    folder = args.out / f"{name}-{seed}"
    if (folder / "eval" / "results.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    where = ["--kb", args.kb, "--data", args.data]
    policy = args.out / f"full-{seed}" if training is None else folder
    commands = [
        [
            "evaluate.py",
            "--ckpt",
            policy / "latest",
            *where,
            "--temperature",
            1,
            "--seed",
            seed,
            "--traces",
            0,
            "--out",
            folder / "eval",
            *(args.init if word == "INIT" else word for word in evaluation.split()),
        ]
    ]
    if training is not None:
        limit = ["--limit", args.limit] if args.limit else []
        commands.insert(
            0,
            [
                "train.py",
                *where,
                "--init",
                args.init,
                *limit,
                "--out",
                folder,
                "--seed",
                seed,
                "--steps",
                args.steps,
                "--max-minutes",
                0,
                "--eval-every",
                args.steps,
                "--eval-questions",
                50,
                "--save-every",
                20,
                "--keep",
                1,
                "--resume",
                *training.split(),
            ],
        )
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    for command in commands:
        with open(folder / "log.txt", "a") as log:
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=environment,
            )
        if done.returncode:
            raise SystemExit(
                f"error: {' '.join(map(str, command))} failed; {folder / 'log.txt'} says why"
            )
    print(f"{name}, seed {seed}: done", flush=True)


def check_settings(args: Args):
    """Write down what OUT is made with, or refuse to add runs made with anything else to it."""
    asked = {name: str(getattr(args, name)) for name in ("kb", "data", "init", "limit", "steps")}
    path = args.out / "settings.json"
    made = json.loads(path.read_text()) if path.exists() else asked
    differ = [
        f"--{name} {made[name]}, not {asked[name]}" for name in asked if made[name] != asked[name]
    ]
    if differ:
        raise SystemExit(
            f"error: the runs in {args.out} are made with {', '.join(differ)}; give this table its own --out"
        )
    path.write_text(json.dumps(made, indent=1))


def accuracies(args: Args, name: str) -> dict[str, np.ndarray] | None:
    """{row: (seeds, questions) right or not} of the seeds that are there; None where none is."""
    folders = {seed: args.out / f"{name}-{seed}" / "eval" for seed in args.seeds}
    found = {
        seed: read_results(folder)
        for seed, folder in folders.items()
        if (folder / "results.json").exists()
    }
    if not found:
        return None
    order = sorted(next(iter(found.values())))
    return {"seeds": list(found)} | {
        row: np.array(
            [
                [np.mean(result[q]["right"]) for q in order if row in result[q]["rows"]]
                for result in found.values()
            ]
        )
        for row in ("bridge", "compare", "overall")
    }


def change(full: np.ndarray, other: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean difference other - full in points, and its 95% interval; both (seeds, questions), the same seeds and questions."""
    difference, rng = other - full, np.random.default_rng(0)
    seeds, questions = difference.shape
    means = [
        difference[rng.integers(seeds, size=seeds)][
            :, rng.integers(questions, size=questions)
        ].mean()
        for _ in range(draws)
    ]
    return 100 * difference.mean(), *(100 * np.percentile(means, [2.5, 97.5]))


def table(args: Args) -> dict:
    """Print the table; returns it as {row: figures}, and writes it to OUT/table.json."""
    from rich.console import Console
    from rich.table import Table

    title = (
        "sampled test accuracy in %, mean of seeds; change against the full method, 95% interval"
    )
    shown, out = Table(title=title), {}
    for column in (
        "",
        "seeds",
        "Bridge",
        "change",
        "paper",
        "Compare",
        "change",
        "paper",
        "format",
        "searches",
    ):
        shown.add_column(column, justify="right" if column else "left")
    full = accuracies(args, "full")
    for name in args.rows:
        label, _, _, *paper = ROWS[name]
        values = accuracies(args, name)
        if values is None:
            continue
        figures = [
            json.loads((args.out / f"{name}-{seed}" / "eval" / "results.json").read_text())
            for seed in values["seeds"]
        ]
        row = out[name] = {
            "seeds": values["seeds"],
            "format_rate": round(float(np.mean([f["format_rate"] for f in figures])), 4),
            "tool_calls": round(float(np.mean([f["tool_calls_mean"] for f in figures])), 3),
        }
        cells = [label, str(len(values["seeds"]))]
        for split, theirs in zip(("bridge", "compare"), paper):
            row[split] = percent(values[split])
            shared = [seed for seed in values["seeds"] if full and seed in full["seeds"]]
            if name == "full" or not shared:
                cells += [f"{row[split]:.1f}", "", ""]
                continue
            ours = change(
                *(
                    side[split][[side["seeds"].index(seed) for seed in shared]]
                    for side in (full, values)
                )
            )
            row[f"{split}_change"] = [round(x, 2) for x in ours]
            cells += [f"{row[split]:.1f}", "{:+.1f} [{:+.1f}, {:+.1f}]".format(*ours), ""]
            if theirs is not None:
                agrees, decided = bool(ours[0] * theirs > 0), bool(ours[1] * ours[2] > 0)
                row |= {
                    f"{split}_paper": round(theirs, 2),
                    f"{split}_sign_agrees": agrees,
                    f"{split}_sign_decided": decided,
                }
                cells[-1] = f"{theirs:+.1f} " + ("?" if not decided else "✓" if agrees else "✗")
        shown.add_row(
            *cells,
            f"{row['format_rate']:.3f}",
            f"{row['tool_calls']:.2f}",
            style="bold" if name == "full" else None,
        )
    Console(width=140).print(shown)
    (args.out / "table.json").write_text(json.dumps(out, indent=1))
    return out


def main(args: Args):
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        raise SystemExit(
            f"error: no row is called {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        check_settings(args)
        for first in (True, False):  # what only evaluates needs the full method's policy
            rows = [
                name
                for name in dict.fromkeys(("full", *args.rows))
                if (ROWS[name][1] is not None) == first
            ]
            todo = [(name, seed) for seed in args.seeds for name in rows]
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda job: run(args, *job), todo))
    table(args)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
