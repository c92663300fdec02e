"""Results in the terminal: the table of an evaluation, one response, the comparison of two."""

from pathlib import Path

from rich.table import Table

from evaluation.summary import TABLE_ROWS, correct
from files.terminal import console, data
from rollout import Response


def print_table(result: dict, title: str):
    """What `summary.summarize` found, as a table and some sentences below it."""
    screen = console(width=100, highlight=True)
    screen.print(accuracy_table(result, title))
    for sentence in sentences(result):
        screen.print(data(sentence))


def accuracy_table(result: dict, title: str) -> Table:
    table = Table(title=data(title))
    table.add_column("")
    for column in ("questions", "accuracy %", "95% interval", "ceiling %"):
        table.add_column(column, justify="right")
    table.add_column("found at each hop")

    # Another benchmark's splits come first; the table ends with "overall".
    counted = [key.removeprefix("n_") for key in result if key.startswith("n_")]
    others = [name for name in counted if name not in TABLE_ROWS]
    for name in [*others, *TABLE_ROWS]:
        if result[f"n_{name}"] == 0:
            continue
        low, high = result[f"ci95_{name}"]
        ceiling = result.get(f"ceiling_{name}", float("nan"))
        recall = result["chain_recall"].get(name, [])
        table.add_row(
            data(TABLE_ROWS.get(name, name)),
            str(result[f"n_{name}"]),
            f"{result[name]:.1f}",
            f"{low:.1f}–{high:.1f}",
            f"{ceiling:.1f}",
            "  ".join(f"{x:.2f}" for x in recall),
            style="bold" if name == "overall" else None,
        )
    return table


def sentences(result: dict) -> list[str]:
    """What stands below the table, as far as there is something to say."""
    said = [conduct(result)]

    enough, fewer = result["enough_searches"], result["fewer_searches"]
    if enough["n"] and fewer["n"]:
        said.append(
            f"right with as many searches as the chain has hops {share(enough)}, "
            f"with fewer {share(fewer)}"
        )
    if "pass_at_k" in result:
        passes = ", ".join(f"pass@{k} {x:.1f}" for k, x in result["pass_at_k"].items())
        said.append(
            f"{result['samples']} responses per question: {passes}, "
            f"majority {result['majority']:.1f}"
        )
    if result.get("compare_guess") is not None:
        both = result["compare_both_retrieved"]
        said.append(
            "Compare: naming one of the two pictured at random would give "
            f"{result['compare_guess']:.1f}"
        )
        if both["n"]:
            said[-1] += (
                f"; with both values retrieved (n={both['n']}) the policy is right in "
                f"{both['accuracy']:.1f}%"
            )
    if result["paper"]:
        theirs = ", ".join(f"{TABLE_ROWS.get(k, k)} {x:g}" for k, x in result["paper"].items())
        said.append(f"the paper reports of its 7B, with its own knowledge base: {theirs}")
    reasons = ", ".join(f"{reason} {count}" for reason, count in result["failures"].items())
    said.append(f"wrong answers: {reasons or 'none'}")
    return said


def conduct(result: dict) -> str:
    """How the policy went about it, and its accuracy by type of answer."""
    early, wasted = result["early_rate"], result["wasted_calls_mean"]
    useless = "" if wasted is None else f" ({wasted:.2f} wasted)"
    too_soon = "" if early is None else f"    answered before the last search {100 * early:.1f}%"
    types = ", ".join(
        f"{kind} {part['accuracy']:.1f} (n={part['n']})" for kind, part in result["by_type"].items()
    )
    return (
        f"format rate {result['format_rate']:.3f}    "
        f"searches per response {result['tool_calls_mean']:.2f}, "
        f"{result['image_calls_mean']:.2f} of them of images{useless}"
        f"{too_soon}    {types}"
    )


def share(part: dict) -> str:
    return f"(n={part['n']}): {part['accuracy']:.1f}%"


def print_response(response: Response):
    """One response: its turns, what each found, and whether the answer is right."""
    question = response.question
    screen = console(width=120)
    images = data(", ".join(image.name for image in question.images))
    problem = question.problem.replace("<image>", "")
    screen.print(f"\n[bold]{data(problem)}[/]  [dim]{images}[/]")
    for turn in response.turns:
        invalid = "" if turn.valid else "  [red]invalid[/]"
        screen.print(
            f"  [italic]{data(turn.thought)}[/] → [cyan]{turn.action}[/] "
            f"{data(turn.argument)}{invalid}"
        )
        for hit in turn.hits:
            text = f": {data(hit.text[:90])}" if hit.text else ""  # a picture's article has none
            screen.print(f"      [dim]{hit.score:.2f} {data(hit.title)}{text}[/]")
    mark = "[green]right[/]" if correct(response) else "[red]wrong[/]"
    answer = data(response.answer or "no answer")
    screen.print(f"  {mark}: {answer}    (gold: {data(question.answer)})")


def print_comparison(a: Path, b: Path, result: dict[str, dict]):
    """What `summary.compare_results` found between two evaluations."""
    table = Table(title=data(f"A = {a}, B = {b}"))
    table.add_column("")
    for column in ("questions", "A %", "B %", "B - A", "95% interval", "p"):
        table.add_column(column, justify="right")
    for row, part in result.items():
        low, high = part["ci95"]
        table.add_row(
            data(TABLE_ROWS.get(row, row)),
            str(part["n"]),
            f"{part['a']:.1f}",
            f"{part['b']:.1f}",
            f"{part['difference']:+.1f}",
            f"{low:+.1f} … {high:+.1f}",
            f"{part['p']:.4f}",
            style="bold" if row == "overall" else None,
        )
    console(width=100, highlight=True).print(table)
