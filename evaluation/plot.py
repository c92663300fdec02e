"""Pictures of a run, redrawn with each of its checkpoints.

    python -m evaluation.plot runs/tiny                  # draw them again
    python -m evaluation.plot runs/tiny runs/other       # one over another, in runs/curves.png

One run has two pictures. `curves.png` tells what it learns: how many held-out questions it answers,
and how often a response answers before its last search. `diagnostics.png` shows the rest: reward,
format, searches, entropy. Of several runs there are the diagnostics alone, in one picture.
"""

import gc
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from tyro.conf import Positional

from files.records import FAULTS, read_log
from files.terminal import fail

# colours of Okabe and Ito, which colour-blind readers tell apart
BLUE, GREEN, RED, GRAY = "#0072B2", "#009E73", "#D55E00", "#595959"
COLORS = (BLUE, RED, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of several runs
TRAINING = [  # one panel each: (key in metrics.jsonl, title, limits of the y axis)
    ("reward_mean", "reward", None),
    ("outcome_mean", "right answers, training questions", (0, 1)),
    ("format_rate", "valid format", (0, 1)),
    ("early_rate", "answers before the last search", (0, 1)),
    ("tool_calls_mean", "searches per response", None),
    ("wasted_calls_mean", "wasted searches per response", None),
    ("entropy", "entropy per token (nats)", None),
    ("logprob_diff_mean", "rollout − training, mean |Δ log-prob|", None),
    ("mfu", "model FLOPs utilisation of the update", (0, 1)),  # where the device's peak is known
]
HELD_OUT = [  # the last panel: (key in metrics.jsonl, line, label)
    ("eval_greedy_overall", "-", "greedy"),
    ("eval_sampled_overall", "--", "sampled"),
    ("eval_greedy_compare", ":", "greedy, Compare only"),  # not where there are several runs
]


class Metrics(NamedTuple):
    """The records of a run's metrics.jsonl, by what wrote them."""

    training: list[dict]
    evaluations: list[dict]
    landmarks: dict  # evaluation/progress.py; {} of a run that is older than they are


def plot_curves(runs: Positional[tuple[Path, ...]], out: Path | None = None) -> Path:
    """Draw the runs' curves into `out`, and those of a single run beside its diagnostics.

    Returns `out`. By default that is curves.png in the run's folder, or beside the first run's
    where there are several. Raises ValueError without runs, FileNotFoundError where one has no
    metrics.jsonl.
    """
    if not runs:
        raise ValueError("say which runs: python -m evaluation.plot runs/tiny runs/other")
    import matplotlib  # slow to import, and train.py draws only beside its checkpoints

    matplotlib.use("Agg")
    metrics = {run: read_metrics(run) for run in runs}
    out = out or (runs[0] if len(runs) == 1 else runs[0].parent) / "curves.png"
    if len(runs) == 1:
        save(draw_story(metrics[runs[0]]), out)
        save(draw_diagnostics(metrics), out.with_name("diagnostics.png"))
    else:
        save(draw_diagnostics(metrics), out)
    gc.collect()  # figures are circles of objects: 25 MB would wait for Python to look for them
    return out


def read_metrics(run: Path) -> Metrics:
    """FileNotFoundError where the folder has no metrics.jsonl."""
    records = read_log(run / "metrics.jsonl")
    training = [record for record in records if "reward_mean" in record]
    evaluations = [record for record in records if "eval_n" in record]
    others = [record for record in records if record.keys() & {"ceiling", "honest"}]
    return Metrics(training, evaluations, others[0] if others else {})


def save(figure, out: Path):
    """The file appears at once: never half a picture."""
    import matplotlib.pyplot as plt

    part = out.with_suffix(".part.png")
    figure.savefig(part)
    plt.close(figure)
    part.replace(out)


def points(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that say something under this key."""
    present = [record for record in records if record.get(key) is not None]
    return [record["step"] for record in present], [record[key] for record in present]


def smooth(values: list[float], reach: int = 3) -> list[float]:
    """The mean of each value and of its neighbors up to `reach` steps away.

    >>> smooth([0.0, 3.0, 6.0, 6.0], reach=1)
    [1.5, 3.0, 5.0, 6.0]
    """
    averages = []
    for i in range(len(values)):
        near = values[max(0, i - reach) : i + reach + 1]
        averages.append(sum(near) / len(near))
    return averages


# ------------------------------------------------------------------------- what one run learns


def draw_story(run: Metrics):
    """Accuracy on held-out questions; below it how often responses answer too early."""
    import matplotlib.pyplot as plt

    # 1) two panels over one x axis; the lower one where something is known of gold chains
    steps, early = points(run.training, "early_rate")
    heights = [3, 1] if early else [3]
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure, axes = plt.subplots(
            len(heights),
            figsize=(9, 1.4 * sum(heights)),
            dpi=200,
            height_ratios=heights,
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
    upper, lower = axes[0, 0], axes[-1, 0]
    last_step = max([record["step"] for record in run.training + run.evaluations], default=1)
    upper.set_xlim(0, max(last_step, 1))
    lower.set_xlabel(x_label(run.training))
    lower.xaxis.get_major_locator().set_params(integer=True)

    # 2) held-out accuracy
    panel_title(upper, "held-out questions answered right (%); thin: training questions, sampled")
    upper.set_ylim(0, 107)  # room for the ceiling's label
    xs, shares = points(run.training, "outcome_mean")
    values = [100 * share for share in shares]
    upper.plot(xs, values, color=GREEN, alpha=0.3, linewidth=1, clip_on=False)
    ends = []  # of what is labelled on the right: (value, label, color)
    for key, label, color, marker in (
        ("eval_greedy_overall", "greedy", BLUE, "o"),
        ("eval_sampled_overall", "sampled", GREEN, "s"),
    ):
        xs, values = points(run.evaluations, key)
        upper.plot(xs, values, color=color, marker=marker, markersize=4, linewidth=2, clip_on=False)
        ends += [(value, f"{label} {value:.0f}%", color) for value in values[-1:]]
    label_start(upper, run.evaluations)

    # 3) what it can be compared with
    if "ceiling" in run.landmarks:
        draw_ceiling(upper, run.landmarks["ceiling"])
    honest = run.landmarks.get("honest", {}).get("greedy")
    if honest is not None:
        upper.axhline(honest, color=GRAY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ends.append((honest, f"imitation of an\nhonest teacher {honest:.0f}%", GRAY))
    label_ends(upper, ends)

    # 4) answers that come too early
    if early:
        shares = [100 * share for share in early]
        title = "sampled training responses that answer before all hops are searched (%)"
        panel_title(lower, f"{title}; thin: each step")
        lower.set_ylim(0, 100)
        lower.set_yticks([0, 50, 100])
        lower.plot(steps, shares, color=RED, alpha=0.3, linewidth=1, clip_on=False)
        lower.plot(steps, smooth(shares), color=RED, linewidth=2, clip_on=False)
        end = smooth(shares)[-1]
        label_ends(lower, [(end, f"{end:.0f}%", RED)])
    return figure


def panel_title(axis, text: str):
    axis.set_title(text, loc="left", fontsize=9.5, color="black")
    axis.grid(axis="y", alpha=0.25, linewidth=0.6)
    axis.tick_params(length=3)


def x_label(training: list[dict]) -> str:
    """The time belongs to the story: RL is short."""
    seconds = sum(r.get("seconds_rollout", 0) + r.get("seconds_train", 0) for r in training)
    took = f" (sampling and updating: {seconds / 60:.1f} minutes in all)" if seconds else ""
    return "step" + took


def draw_ceiling(axis, ceiling: float):
    axis.axhline(ceiling, color=GRAY, linewidth=1, zorder=4)  # above the label's white
    axis.annotate(
        f"ceiling: a perfect policy with these retrievers {ceiling:.0f}%",
        (0, ceiling),
        xycoords=("axes fraction", "data"),
        xytext=(3, 3),
        textcoords="offset points",
        color=GRAY,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # over a line of the grid
    )


def label_start(axis, evaluations: list[dict]):
    """Both accuracies before RL, below and to the right of where the curves begin."""
    first = evaluations[0] if evaluations else {}
    greedy, sampled = first.get("eval_greedy_overall"), first.get("eval_sampled_overall")
    if first.get("step") != 0 or greedy is None or sampled is None:
        return
    axis.annotate(
        f"before RL: greedy {greedy:.0f}%, sampled {sampled:.0f}%",
        (0, max(min(greedy, sampled), 8)),  # above the axis
        xytext=(12, -4),
        textcoords="offset points",
        verticalalignment="top",
        color=GRAY,
    )


def label_ends(axis, ends: list[tuple[float, str, str]]):
    """Labels (value, text, color) to the right of the axis, at their values where there is room."""
    axis.figure.draw_without_rendering()  # it is laid out now: the axis has its size
    low, high = axis.get_ylim()
    points_high = 72 * axis.get_window_extent().height / axis.figure.dpi
    one_line = 13 * (high - low) / points_high  # of a font of 9 points
    lines = [text.count("\n") + 1 for _, text, _ in ends]
    places = spread([value for value, _, _ in ends], [one_line * count for count in lines])
    for place, (_, text, color) in zip(places, ends):
        axis.annotate(
            text,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            verticalalignment="center",
            linespacing=1.05,
            annotation_clip=False,
            color=color,
        )


def spread(values: list[float], heights: list[float]) -> list[float]:
    """Where to put the middles of labels of these heights: near their values, without overlap.

    >>> spread([50.0, 50.0, 90.0], [4.0, 4.0, 4.0])
    [48.0, 52.0, 90.0]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = list(values)
    for _ in range(100):  # each round pushes neighbors apart, which may push others together
        for below, above in zip(order, order[1:]):
            needed = (heights[below] + heights[above]) / 2
            overlap = needed - (places[above] - places[below])
            if overlap > 0:
                places[below] -= overlap / 2
                places[above] += overlap / 2
    return places


# --------------------------------------------------------------- the rest, of one or more runs


def draw_diagnostics(runs: dict[Path, Metrics]):
    """A panel per figure that is known, the last one for the held-out questions; the runs in one
    color each."""
    import matplotlib.pyplot as plt

    # 1) the panels
    records = [record for run in runs.values() for record in run.training]
    shown = [panel for panel in TRAINING if points(records, panel[0])[0]]
    columns = len(shown) // 2 + 1  # of two rows, with one panel more
    size = (3.75 * columns, 6.5)
    figure, axes = plt.subplots(
        2, columns, figsize=size, dpi=110, squeeze=False, layout="constrained"
    )
    *panels, last = axes.flat[: len(shown) + 1]
    for axis in axes.flat[len(shown) + 1 :]:
        axis.set_axis_off()
    for axis, (_, title, limits) in zip(panels, shown):
        axis.set_title(title, fontsize=11)
        if limits:
            axis.set_ylim(*limits)
    last.set_title("held-out accuracy (%)", fontsize=11)
    last.set_ylim(0, 100)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")

    # 2) the runs
    held_out = HELD_OUT if len(runs) == 1 else HELD_OUT[:2]
    for (run, metrics), color in zip(runs.items(), cycle(COLORS)):
        for axis, (key, _, _) in zip(panels, shown):
            draw_training(axis, metrics.training, key, color, run.name)
        draw_held_out(last, metrics.evaluations, held_out, color)

    # 3) legends
    if last.lines:
        last.legend(fontsize=8)
    if len(runs) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_training(axis, records: list[dict], key: str, color, label: str):
    """A figure by step, thin, and smoothed, thick."""
    steps, values = points(records, key)
    axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    axis.plot(steps, smooth(values), color=color, linewidth=2, label=label)


def draw_held_out(axis, records: list[dict], curves: list[tuple], color):
    """Accuracies by step; each kind of line is labelled once, whatever the number of runs."""
    if not records:
        return
    for key, style, label in curves:
        _, labels = axis.get_legend_handles_labels()
        axis.plot(
            *points(records, key),
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
    except FAULTS as error:
        fail(error)
