"""Pictures of a run: `curves.png`, redrawn while it trains.

python -m evaluation.plot runs/tiny                  # draw it again
python -m evaluation.plot runs/tiny runs/other       # several, one over another: runs/curves.png
"""

import json
import sys
from itertools import cycle
from pathlib import Path

from tyro.conf import Positional

TRAINING = [  # one panel each: (key in metrics.jsonl, title, limits of the y axis)
    ("reward_mean", "reward", None),
    ("outcome_mean", "accuracy on sampled training questions", (0, 1)),
    ("format_rate", "valid format", (0, 1)),
    ("tool_calls_mean", "searches per response", None),
    ("entropy", "entropy per token (nats)", None),
]
HELD_OUT = [  # the last panel: (key in metrics.jsonl, line, label)
    ("eval_greedy_overall", "-", "greedy"),
    ("eval_sampled_overall", "--", "sampled"),
    ("eval_greedy_compare", ":", "greedy, Compare only"),  # not where there are several runs
]


def plot_curves(runs: Positional[tuple[Path, ...]], out: Path | None = None) -> Path:
    """Draw the runs' curves into `out`; returns it.

    By default that is curves.png in the run's folder, or beside the first run's where there are
    several. Raises ValueError without runs, FileNotFoundError where one has no metrics.jsonl.
    """
    if not runs:
        raise ValueError("say which runs: python -m evaluation.plot runs/tiny runs/other")
    import matplotlib  # slow to import, and train.py draws only at its evaluations

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # 1) six panels, the last one for the held-out questions
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    *panels, last = axes.flat
    for axis, (_, title, limits) in zip(panels, TRAINING):
        axis.set_title(title, fontsize=11)
        if limits:
            axis.set_ylim(*limits)
    last.set_title("held-out accuracy (%)", fontsize=11)
    last.set_ylim(0, 100)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")

    # 2) the runs, one colour each
    held_out = HELD_OUT if len(runs) == 1 else HELD_OUT[:2]
    for run, color in zip(runs, cycle(plt.get_cmap("tab10").colors)):
        training, evaluations = read_metrics(run)
        for axis, (key, _, _) in zip(panels, TRAINING):
            draw_training(axis, training, key, color, run.name)
        draw_held_out(last, evaluations, held_out, color)

    # 3) legends, and the file: never half a picture
    if last.lines:
        last.legend(fontsize=8)
    if len(runs) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    out = out or (runs[0] if len(runs) == 1 else runs[0].parent) / "curves.png"
    part = out.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(out)
    return out


def read_metrics(run: Path) -> tuple[list[dict], list[dict]]:
    """(records of training, of evaluations) of a run's folder; FileNotFoundError without any."""
    with open(run / "metrics.jsonl") as lines:
        records = [json.loads(line) for line in lines]
    training = [record for record in records if "reward_mean" in record]
    evaluations = [record for record in records if "eval_n" in record]
    return training, evaluations


def draw_training(axis, records: list[dict], key: str, color, label: str):
    """A figure by step, thin, and smoothed, thick."""
    if not records:
        return
    steps = [record["step"] for record in records]
    values = [record[key] for record in records]
    axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    axis.plot(steps, smooth(values), color=color, linewidth=2, label=label)


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about ten steps.

    >>> smooth([1.0, 1.0, 0.0])
    [1.0, 1.0, 0.9]
    """
    average = values[0]
    averages = []
    for value in values:
        average = 0.9 * average + 0.1 * value
        averages.append(average)
    return averages


def draw_held_out(axis, records: list[dict], curves: list[tuple], color):
    """Accuracies by step; each kind of line is labelled once, whatever the number of runs."""
    if not records:
        return
    steps = [record["step"] for record in records]
    for key, style, label in curves:
        _, labels = axis.get_legend_handles_labels()
        axis.plot(
            steps,
            [record[key] for record in records],
            style,
            color=color,
            marker="o",
            markersize=3,
            label=None if label in labels else label,
        )


if __name__ == "__main__":
    import tyro

    try:
        print(f"wrote {tyro.cli(plot_curves)}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
