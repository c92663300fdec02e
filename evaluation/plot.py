"""Pictures of a run: `curves.png`, redrawn while it trains.

python -m evaluation.plot runs/tiny                     # draw it again
python -m evaluation.plot runs/tiny runs/other          # several runs over one another: runs/curves.png
"""

import json
import sys
from pathlib import Path

from tyro.conf import Positional

PANELS = [
    ("reward_mean", "reward", None),
    ("outcome_mean", "accuracy on sampled training questions", (0, 1)),
    ("format_rate", "valid format", (0, 1)),
    ("tool_calls_mean", "tool calls a response", None),
    ("entropy", "entropy a token (nats)", None),
    (None, "held-out accuracy (%)", (0, 100)),
]


def read_metrics(run: Path) -> tuple[list[dict], list[dict]]:
    """(training records, evaluation records) of a run folder. Raises FileNotFoundError when there is none."""
    records = [json.loads(line) for line in open(run / "metrics.jsonl")]
    return [r for r in records if "reward_mean" in r], [r for r in records if "eval_n" in r]


def plot_curves(runs: Positional[tuple[Path, ...]], out: Path | None = None) -> Path:
    """Draw the runs' curves into `out`: by default curves.png in the run's folder, or beside the first run's where there are several.

    Raises ValueError without runs, FileNotFoundError where one has no metrics.jsonl.
    """
    if not runs:
        raise ValueError("say which runs: python -m evaluation.plot runs/tiny runs/other")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out = out or (runs[0] if len(runs) == 1 else runs[0].parent) / "curves.png"
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    colors = plt.get_cmap("tab10").colors
    for number, run in enumerate(runs):
        training, evaluations = read_metrics(run)
        for axis, (name, title, limits) in zip(axes.flat, PANELS):
            axis.set_title(title, fontsize=11)
            if name and training:
                steps, values = [r["step"] for r in training], [r[name] for r in training]
                smooth, out_values = values[0], []
                for value in values:  # exponential moving average over about ten steps
                    smooth = 0.9 * smooth + 0.1 * value
                    out_values.append(smooth)
                axis.plot(steps, values, color=colors[number], alpha=0.25, linewidth=1)
                axis.plot(steps, out_values, color=colors[number], linewidth=2, label=run.name)
            if not name and evaluations:
                steps = [r["step"] for r in evaluations]
                shown = [
                    ("eval_greedy_overall", "-", "greedy"),
                    ("eval_sampled_overall", "--", "sampled"),
                ]
                if len(runs) == 1:
                    shown += [("eval_greedy_compare", ":", "greedy, Compare only")]
                for key, style, what in shown:
                    axis.plot(
                        steps,
                        [r[key] for r in evaluations],
                        style,
                        color=colors[number],
                        marker="o",
                        markersize=3,
                        label=None if what in axis.get_legend_handles_labels()[1] else what,
                    )
            if limits:
                axis.set_ylim(*limits)
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    if axes[1, 2].lines:
        axes[1, 2].legend(fontsize=8)
    if len(runs) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    part = out.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(out)
    return out


if __name__ == "__main__":
    import tyro

    try:
        print(f"wrote {tyro.cli(plot_curves)}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
