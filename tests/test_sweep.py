"""Tables of many runs: what is done once is not done again; a setting's rows are comparable."""

import json
import re
from dataclasses import asdict

import pytest

from config import PRESETS
from evaluation import runs, sweep


def test_a_job_that_is_done_is_not_done_again(tmp_path, capsys):
    """Its command counts how often it ran, and writes what says that it is complete."""
    folder = tmp_path / "G8-0"
    script = (
        "import pathlib, sys; folder = pathlib.Path(sys.argv[1]); (folder / 'eval').mkdir(); "
        "open(folder / 'count', 'a').write('x'); (folder / 'eval/results.json').write_text('{}')"
    )
    job = runs.Job(folder, [["-c", script, str(folder)]])
    runs.say_what_is_to_do([job], 2)
    runs.run_all([job], 2)
    runs.say_what_is_to_do([job], 2)
    runs.run_all([job], 2)
    assert (folder / "count").read_text() == "x"
    shown = capsys.readouterr().out
    assert "0 of 1 runs are there already\nto do, 2 at a time: G8-0\n" in shown
    assert re.search(r"G8-0: done in \d+\.\d minutes\n1 of 1 runs are there already\n", shown)
    assert runs.seeds_there(tmp_path, "G8") == [0]


def test_a_job_that_fails_says_where_its_log_is(tmp_path):
    job = runs.Job(tmp_path / "G8-0", [["-c", "raise SystemExit('no memory')"]])
    with pytest.raises(SystemExit, match="log.txt says why"):
        runs.run_all([job], 1)
    assert "no memory" in (tmp_path / "G8-0" / "log.txt").read_text()


def flags_of(row) -> dict[str, str]:
    """{flag: its value}; those without one are flags, too."""
    words = row.flags.split()
    return {
        word: following for word, following in zip(words, [*words[1:], ""]) if word.startswith("--")
    }


def test_every_row_samples_equally_many_responses_per_step():
    for rows in sweep.SWEEPS.values():
        assert {flags_of(row)["--max-refills"] for row in rows.values()} == {"0"}
    for row in sweep.SWEEPS["group-size"].values():
        flags = flags_of(row)
        size, questions = int(flags["--group-size"]), int(flags["--questions-per-step"])
        assert size * questions == sweep.RESPONSES
        assert questions == row.questions
        assert ("--no-dynamic-sampling" in flags) == (size == 1)
    tiny = PRESETS["tiny"]
    assert tiny.group_size * tiny.questions_per_step == sweep.RESPONSES
    assert {row.questions for row in sweep.SWEEPS["learning-rate"].values()} == {
        tiny.questions_per_step
    }


def test_every_flag_of_a_row_is_a_setting():
    settings = {f"--{name.replace('_', '-')}" for name in asdict(PRESETS["tiny"])}
    for rows in sweep.SWEEPS.values():
        for row in rows.values():
            flags = {flag.replace("--no-", "--") for flag in flags_of(row)}
            assert flags <= settings


def made_up_run(folder, accuracies, sampled):
    for name, overall in (("eval", sampled), ("eval-greedy", sampled + 5)):
        (folder / name).mkdir(parents=True)
        result = {"overall": overall, "format_rate": 0.9, "tool_calls_mean": 3.0}
        (folder / name / "results.json").write_text(json.dumps(result))
    figures = {"reward_mean": 1.0, "clip_fraction": 0.01, "entropy": 0.1, "groups_kept": 8}
    figures |= {"seconds_rollout": 2.0, "seconds_train": 1.5, "updates_skipped": 0}
    figures |= {"logprob_diff_mean": 1e-6}
    lines = [
        {"step": step, "outcome_mean": accuracy} | figures
        for step, accuracy in enumerate(accuracies, 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def test_the_table_of_a_setting_says_where_it_breaks(tmp_path, capsys):
    rises, breaks = [0.5] * 5 + [0.8] * 10, [0.5] * 5 + [0.8] * 5 + [0.1] * 5
    made_up_run(tmp_path / "lr5e-5x2-0", rises, sampled=80.0)
    made_up_run(tmp_path / "lr5e-5x2-1", rises, sampled=70.0)
    made_up_run(tmp_path / "lr4e-4x2-0", breaks, sampled=10.0)
    sweep.main(sweep.Args("learning-rate", out=tmp_path, table=True))
    table = json.loads((tmp_path / "table.json").read_text())
    assert set(table) == {"lr5e-5x2", "lr4e-4x2"}
    assert table["lr5e-5x2"]["seeds"] == [0, 1]
    assert (table["lr5e-5x2"]["sampled"], table["lr5e-5x2"]["greedy"]) == (75.0, 80.0)
    assert table["lr5e-5x2"]["groups_kept"] == 0.5
    assert table["lr5e-5x2"]["seconds"] == 3.5
    assert table["lr5e-5x2"]["falls_after"] == [None, None]
    assert table["lr4e-4x2"]["falls_after"] == [10]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "falls after" in capsys.readouterr().out


def test_steps_that_kept_no_group_measure_no_entropy(tmp_path):
    made_up_run(tmp_path, [0.5] * 10, sampled=80.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    nothing = {"groups_kept": 0, "entropy": 0.0, "clip_fraction": 0.0, "logprob_diff_mean": 0.0}
    lines += [line | nothing for line in lines[:5]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = sweep.figures_of(tmp_path, sweep.SWEEPS["group-size"]["G8"])
    assert (figures["entropy"], figures["clip_fraction"]) == pytest.approx((0.1, 0.01))
    assert figures["groups_kept"] == pytest.approx(8 * 10 / 15 / 16)


def test_a_row_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no row is called G3"):
        sweep.main(sweep.Args("group-size", rows=("G3",), out=tmp_path))
