"""Evaluation: what fraction of the questions a policy answers, how it searched, and where it failed.

    python evaluate.py --ckpt runs/tiny/latest                          # the test questions: a table, three files
    python evaluate.py --ckpt runs/tiny/latest --mode static            # the same policy in a fixed pipeline; other modes: evaluation/baselines.py
    python evaluate.py --ckpt runs/tiny/latest --temperature 1 --samples 8
    python evaluate.py --base-url http://localhost:8000/v1 --model NAME --mode prompted --out runs/other
    python evaluate.py --compare runs/a/latest-eval runs/b/latest-eval  # is the difference real?
    python evaluate.py --score predictions.jsonl --references data/MMhops --benchmark mmhops     # official metrics, see evaluation/official.py

What the figures mean is in evaluation/summary.py. Batches are kept as they are finished: an evaluation that was killed goes on where it stopped, with
the same result, for every batch draws from its own seed.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: spinning OpenMP threads stall shared machines

import torch
from tqdm import tqdm

from data import DataError, Question, load_questions
from distributed import all_objects, all_or_none, gathered, left_on_any_rank, world
from engine.weights import check_name
from evaluation import baselines, report
from evaluation.summary import ROWS, compare, correct, record, revive, summarize
from knowledge.client import connect
from model import load_policy
from retrieval import KnowledgeBaseError
from reward import RewardConfig
from rollout import Response, RolloutConfig, sample


def evaluate(
    ask,
    questions: list[Question],
    batch: int = 128,
    seed: int = 0,
    device="cpu",
    progress: bool = False,
    done: int = 0,
    keep=None,
) -> list[Response]:
    """The episodes of `ask(questions, generator)`, in the questions' order, from question `done` on; `keep` gets each batch's."""
    responses = []
    for start in tqdm(
        range(done, len(questions), batch),
        disable=not progress,
        desc="evaluate",
        leave=False,
        initial=done // batch,
        total=-(-len(questions) // batch),
    ):
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + start)
        new = ask(questions[start : start + batch], generator)
        responses += new
        if keep:
            keep(new)
    return responses


def evaluate_both_ways(policy, kb, questions: list[Question], cfg) -> dict:
    """Sampled (temperature 1) and greedy; the same result on all ranks, as `eval_…`.

    Each rank asks a share of the questions.
    """
    rank, ranks = world()
    out, started = {"eval_n": len(questions)}, time.time()
    any_left = left_on_any_rank(policy, cfg.gather_weights)
    share = -(-len(questions) // ranks)
    mine = questions[rank * share : (rank + 1) * share]
    padded = (mine + questions)[:share]  # equally many batches on every rank
    policy.model.eval()
    with gathered(policy.model, cfg.gather_weights):
        for mode, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            once = replace(cfg, group_size=1, temperature=temperature)

            def ask(some, generator, once=once):
                return sample(policy, kb, some, once, generator, any_left)

            with all_or_none(any_left, policy.device, KnowledgeBaseError):
                responses = evaluate(ask, padded, cfg.rollout_rows, cfg.seed + rank, policy.device)
            plain = [replace(r, prompt=None) for r in responses[: len(mine)]]
            result = summarize(all_objects(plain))
            for row in ("overall", "bridge", "compare", "bridge_2", "bridge_3", "bridge_4"):
                out[f"eval_{mode}_{row}"] = result[row]
            out[f"eval_{mode}_format_rate"] = result["format_rate"]
            out[f"eval_{mode}_tool_calls"] = result["tool_calls_mean"]
            out[f"eval_{mode}_failures"] = result["failures"]
    out["eval_format_rate"] = out["eval_sampled_format_rate"]
    return out | {"eval_seconds": round(time.time() - started, 1)}


def print_table(result: dict, title: str):
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("", "questions", "accuracy %", "95% interval", "ceiling %", "found at each hop"):
        table.add_column(column, justify="left" if column in ("", "found at each hop") else "right")
    order = [key[2:] for key in result if key.startswith("n_") and key[2:] not in ROWS] + list(ROWS)
    for name, label in ((name, ROWS.get(name, name)) for name in order):
        if result[f"n_{name}"]:
            table.add_row(
                label,
                str(result[f"n_{name}"]),
                f"{result[name]:.1f}",
                "{:.1f}–{:.1f}".format(*result[f"ci95_{name}"]),
                f"{result.get(f'ceiling_{name}', float('nan')):.1f}",
                "  ".join(f"{x:.2f}" for x in result["chain_recall"].get(name, [])),
                style="bold" if name == "overall" else None,
            )
    console = Console(width=100)
    console.print(table)
    useless = (
        f" ({result['wasted_calls_mean']:.2f} wasted)"
        if result["wasted_calls_mean"] is not None
        else ""
    )
    console.print(
        f"format rate {result['format_rate']:.3f}    searches an episode {result['tool_calls_mean']:.2f}{useless}    "
        + ", ".join(
            "{} {accuracy:.1f} (n={n})".format(kind, **part)
            for kind, part in result["by_type"].items()
        )
    )
    if result["enough_searches"]["n"] and result["fewer_searches"]["n"]:
        console.print(
            "right with as many searches as the chain has steps (n={n}): {accuracy:.1f}%".format(
                **result["enough_searches"]
            )
            + ", with fewer (n={n}): {accuracy:.1f}%".format(**result["fewer_searches"])
        )
    if result["samples"] > 1:
        console.print(
            f"{result['samples']} responses a question: "
            + ", ".join(f"pass@{k} {x:.1f}" for k, x in result["pass_at_k"].items())
            + f", majority {result['majority']:.1f}"
        )
    if "compare_guess" in result:
        both = result["compare_both_retrieved"]
        console.print(
            f"Compare: naming one of the two pictured at random would give {result['compare_guess']:.1f}; with both values "
            f"retrieved (n={both['n']}) the policy is right in {both['accuracy'] if both['n'] else float('nan'):.1f}%"
        )
    console.print(
        "wrong answers: "
        + (", ".join(f"{reason} {count}" for reason, count in result["failures"].items()) or "none")
    )


def print_trace(t: Response):
    """An episode in the terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(width=120, highlight=False)
    images = ", ".join(image.name for image in t.question.images)
    console.print(
        f"\n[bold]{escape(t.question.problem.replace('<image>', ''))}[/]  [dim]{images}[/]"
    )
    for turn in t.turns:
        console.print(
            f"  [italic]{escape(turn.thought)}[/] → [cyan]{turn.action}[/] {escape(turn.argument)}"
            + "  [red]invalid[/]" * (not turn.valid)
        )
        for hit in turn.hits:
            console.print(
                f"      [dim]{hit.score:.2f} {escape(hit.title)}: {escape(hit.text[:90])}[/]"
            )
    mark = "[green]right[/]" if correct(t) else "[red]wrong[/]"
    console.print(
        f"  {mark}: {escape(t.answer or 'no answer')}    (gold: {escape(t.question.answer)})"
    )


def print_comparison(a: Path, b: Path):
    from rich.console import Console
    from rich.table import Table

    table, result = Table(title=f"A = {a}, B = {b}"), compare(a, b)
    for column in ("", "questions", "A %", "B %", "B - A", "95% interval", "p"):
        table.add_column(column, justify="right" if column else "left")
    for row, part in result.items():
        table.add_row(
            ROWS.get(row, row),
            str(part["n"]),
            f"{part['a']:.1f}",
            f"{part['b']:.1f}",
            f"{part['difference']:+.1f}",
            "{:+.1f} … {:+.1f}".format(*part["ci95"]),
            f"{part['p']:.4f}",
            style="bold" if row == "overall" else None,
        )
    Console(width=100).print(table)


@dataclass
class Args:
    """Evaluate a policy on questions, compare two evaluations, or score a file of predictions."""

    ckpt: Path | None = None
    base_url: str = ""  # or a model behind an OpenAI-compatible endpoint,
    model: str = ""  # and its name
    mode: baselines.Mode = "agent"  # see evaluation/baselines.py
    examples: Path | None = None  # prompted: a file of worked examples to show
    captions: Path | None = None  # text-only: {"id", "caption"} a line
    data: Path = Path("data/mmhops")  # a folder with the split's questions, or a file of them
    kb: Path = Path("data/kb")
    text_url: str = ""  # search over HTTP instead: the servers' addresses
    image_url: str = ""
    images: Path | None = None  # INFOSEEK, E-VQA: where their pictures are
    qtypes: Path | None = None  # INFOSEEK: its file of question types
    split: str = "test"
    limit: int | None = None
    shuffle_seed: int | None = None
    max_turns: int | None = None  # the checkpoint's own unless given
    topk: int | None = None
    temperature: float = 0.0  # 0 is greedy
    samples: int = 1  # responses a question, for pass@k and the majority vote
    oracle_image: bool = False  # ablation: image search answers with the gold entity
    seed: int = 0
    batch: int = 128  # responses at once
    traces: int = 5  # example traces to print
    out: Path | None = (
        None  # where the files go; default: beside the checkpoint, CKPT-eval (CKPT-eval-MODE)
    )
    compare: tuple[Path, Path] | None = None  # two folders that this command wrote
    score: Path | None = None  # score this file of predictions by an official metric instead
    references: Path | None = None  # …against these: the benchmark's own file or folder
    benchmark: Literal["mmhops", "infoseek", "evqa"] = "mmhops"
    bem: Path | None = None  # E-VQA: folder of the answer-equivalence classifier


def recipe(ckpt: Path | None) -> tuple[RolloutConfig, RewardConfig]:
    """The settings a checkpoint was trained with, or the paper's."""
    if ckpt:
        check_name(ckpt)
    path = ckpt and ckpt / "recipe.json"
    saved = json.loads(path.read_text()) if path and path.exists() else {}
    return tuple(
        kind(**{f.name: saved[f.name] for f in fields(kind) if f.name in saved})
        for kind in (RolloutConfig, RewardConfig)
    )


def score(args: Args):
    from evaluation import official

    if args.references is None:
        raise ValueError("--score needs --references, the benchmark's own file or folder")
    official.print_scores(
        official.score_mmhops(args.score, args.references, args.split)
        if args.benchmark == "mmhops"
        else official.score_infoseek(args.score, args.references, args.qtypes)
        if args.benchmark == "infoseek"
        else official.score_evqa(args.score, args.references, args.bem)
    )


def main(args: Args):
    if args.score:
        return score(args)
    if args.compare:
        return print_comparison(*args.compare)
    if args.ckpt is None and not (args.base_url and args.model):
        raise ValueError(
            "say which checkpoint, --ckpt runs/tiny/latest, or which endpoint, --base-url URL --model NAME; "
            "or --compare A B, or --score FILE"
        )
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(
            "--samples above 1 needs a --temperature above 0: greedy responses are all the same"
        )
    cfg, rewarded = recipe(args.ckpt)
    cfg = baselines.settings(args.mode, cfg, args.examples.read_text() if args.examples else "")
    cfg = replace(
        cfg, oracle_image=args.oracle_image, temperature=args.temperature, group_size=args.samples
    )
    if args.mode not in ("direct", "static"):
        cfg = replace(cfg, max_turns=cfg.max_turns if args.max_turns is None else args.max_turns)
    cfg = replace(cfg, topk=args.topk or cfg.topk)
    questions = load_questions(
        args.data, args.split, args.limit, args.shuffle_seed, args.images, args.qtypes
    )
    kb, device = (
        connect(args.kb, args.text_url, args.image_url),
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    captions, tokenizer, name = (
        baselines.read_captions(args.captions),
        None,
        args.model or str(args.ckpt),
    )
    if args.base_url:
        endpoint = baselines.Endpoint(args.base_url, args.model)

        def ask(questions, generator):
            return baselines.run_endpoint(args.mode, endpoint, kb, questions, cfg, captions)
    else:
        policy = load_policy(args.ckpt, device=device)
        policy.model.eval()
        tokenizer = policy.tokenizer

        def ask(questions, generator):
            return baselines.run(args.mode, policy, kb, questions, cfg, generator, captions
            )

    suffix = "-eval" + (f"-{args.mode}" if args.mode != "agent" else "")
    beside = (
        Path("runs") / args.model.replace("/", "-") / suffix[1:]
        if args.base_url
        else args.ckpt.parent / f"{args.ckpt.name}{suffix}"
    )
    out = args.out or beside
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "policy": name if args.base_url else str(args.ckpt.resolve()),
        "mode": args.mode,
        "data": str(args.data),
        "split": args.split,
        "questions": len(questions),
        "shuffle_seed": args.shuffle_seed,
        "seed": args.seed,
        "batch": args.batch,
        "rollout": asdict(cfg),
    }
    part, size = out / "predictions.part.jsonl", max(1, args.batch // args.samples)
    saved = resume(part, settings, size * args.samples)
    responses = [revive(line, questions[i // args.samples]) for i, line in enumerate(saved)]
    with open(part, "a", encoding="utf-8") as file:

        def keep(new):
            lines = [record(t, rewarded, tokenizer) for t in new]
            saved.extend(lines)
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()

        responses += evaluate(
            ask, questions, size, args.seed, device, True, len(saved) // args.samples, keep
        )
    result = summarize(responses, kb, cfg, args.samples) | {
        "ckpt": name,
        "temperature": args.temperature,
        **settings,
    }
    (out / "results.json").write_text(json.dumps(result, indent=1, default=str))
    part.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in saved), encoding="utf-8"
    )
    part.replace(out / "predictions.jsonl")
    page = report.write(out, args.kb)
    print_table(
        result,
        f"{name}, {args.mode}, {'greedy' if args.temperature == 0 else f'temperature {args.temperature:g}'}, "
        f"T={cfg.max_turns}, top-{cfg.topk}{', ORACLE IMAGES' if cfg.oracle_image else ''}",
    )
    for t in responses[: args.traces * args.samples : args.samples]:
        print_trace(t)
    print(f"\nwrote {out / 'results.json'}, predictions.jsonl and {page.name}")


def resume(part: Path, settings: dict, size: int) -> list[dict]:
    """The records of whole batches that an evaluation with the same settings left behind; the file then holds the settings and these."""
    first, lines = json.dumps(settings, sort_keys=True, default=str), []
    if part.exists():
        with open(part, encoding="utf-8") as file:
            if file.readline() == first + "\n":
                lines = [line for line in file if line.endswith("\n")]
    lines = lines[: len(lines) // size * size]
    part.write_text("".join([first + "\n", *lines]), encoding="utf-8")
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (DataError, KnowledgeBaseError, ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
