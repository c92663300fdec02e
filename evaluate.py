"""Evaluation: what fraction of the questions a policy answers, how it searched, and where it failed.

    python evaluate.py --ckpt runs/tiny/latest                  # the test questions; prints a table, writes results.json
    python evaluate.py --score predictions.jsonl --references data/MMhops --benchmark mmhops     # official metrics, see metrics.py

Accuracies follow the benchmark: Bridge (3- and 4-step), Compare, and Overall, which is both. Our 2-step questions are a
row of their own. Beside the policy's figures stand two that need no policy:

- **ceiling**: a perfect policy with the same retrievers: every image search of the gold chain hits, and every text search
  with a well-put query shows the passage. What is missing to 100% the retriever cannot find.
- **recall along the chain**: for each gold hop, how often its passage (or image) was among what the policy retrieved.
"""
from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning OpenMP threads stall shared machines

import numpy as np
import torch
from tqdm import tqdm

from data import DataError, Question, load_questions
from distributed import Preempted, agree, all_objects, gathered, going_on, world
from model import check_name, load_policy
from retrieval import KnowledgeBaseError
from reward import format_reward, score_answer
from rollout import RolloutConfig, Trajectory, sample
from serving import connect


def correct(t: Trajectory) -> int:
    return score_answer(t.answer, t.question.answer_eval, t.question.problem_type)


def rows_of(questions: list[Question]) -> dict[str, np.ndarray]:
    """The rows of the table, as boolean masks over the questions; other benchmarks' splits are rows of their own."""
    steps, splits = np.array([q.num_steps or 0 for q in questions]), np.array([q.split for q in questions])
    bridge = splits == "Bridge"
    return {"overall": ~bridge | (steps != 2), "bridge": bridge & (steps != 2), "compare": splits == "Compare",
            **{f"bridge_{n}": bridge & (steps == n) for n in (2, 3, 4)},
            **{str(name): splits == name for name in sorted(set(splits) - {"Bridge", "Compare"})}}


def found(hop, hits) -> bool:
    return any(hit.row in hop.rows for hit in hits)


def ceiling(kb, questions: list[Question], cfg: RolloutConfig) -> np.ndarray:
    """(N,) bool: would a perfect policy with these retrievers reach the answer? All False where there are no gold chains."""
    reached = np.array([q.hops is not None for q in questions])
    text = [(i, hop) for i, q in enumerate(questions) for hop in q.hops or () if hop.action == "text_search"]
    image = [(i, hop) for i, q in enumerate(questions) for hop in q.hops or () if hop.action == "image_search"]
    for (i, hop), hits in zip(text, kb.text_search([hop.query for _, hop in text], cfg.topk)):
        reached[i] &= found(hop, hits)
    for (i, hop), hits in zip(image, kb.image_search([questions[i].images[int(hop.about) - 1] for i, hop in image], cfg.image_topk)):
        reached[i] &= cfg.oracle_image or found(hop, hits)
    return reached


def failure(t: Trajectory) -> str:
    """Why a wrong answer is wrong, by the first thing that went wrong along the gold chain."""
    if t.answer is None:
        return "no answer"
    hops, tools = t.question.hops or (), [turn for turn in t.turns if turn.valid and turn.action != "answer"]
    hit = [any(turn.action == hop.action and found(hop, turn.hits) for turn in t.turns) for hop in hops]
    if not hops:
        return "unknown"
    if all(hit):
        return "wrong comparison" if t.question.split == "Compare" else "wrong reading"
    if len(tools) < len(hops):
        return "answered too early" if len(t.turns) <= len(hops) else "a turn was wasted"
    first = hops[hit.index(False)]
    return "wrong image hit" if first.action == "image_search" else "wrong query"


def summarize(trajectories: list[Trajectory], kb=None, cfg: RolloutConfig | None = None) -> dict:
    """Accuracies in percent, rates in 0–1. The ceiling is worked out where a KB is given."""
    questions = [t.question for t in trajectories]
    right, result = np.array([correct(t) for t in trajectories]), {"n": len(trajectories)}
    rows = rows_of(questions)
    for name, mask in rows.items():
        result[name] = round(100 * right[mask].mean(), 2) if mask.any() else None
        result[f"n_{name}"] = int(mask.sum())
    draws = np.random.default_rng(0).choice(right[rows["overall"]], (1000, rows["overall"].sum())) if rows["overall"].any() else np.zeros((1, 1))
    result["ci95"] = [round(100 * float(bound), 2) for bound in np.percentile(draws.mean(1), [2.5, 97.5])]
    tools = [[turn for turn in t.turns if turn.valid and turn.action != "answer"] for t in trajectories]
    result["format_rate"] = round(float(np.mean([format_reward(t) for t in trajectories])), 4)
    result["tool_calls_mean"] = round(float(np.mean([len(calls) for calls in tools])), 3)
    chains = [t for t in trajectories if t.question.hops]
    result["chain_recall"] = {}
    for name, mask in rows.items():
        if name in ("compare", "bridge_2", "bridge_3", "bridge_4"):
            hits = [[any(turn.action == hop.action and found(hop, turn.hits) for turn in t.turns) for hop in t.question.hops]
                    for t, chosen in zip(trajectories, mask) if chosen and t.question.hops]
            result["chain_recall"][name] = [round(float(x), 3) for x in np.mean(hits, 0)] if hits else []
    both = [correct(t) for t in chains if t.question.split == "Compare" and all(
        any(found(hop, turn.hits) for turn in t.turns) for hop in t.question.hops)]
    result["compare_both_retrieved"] = {"n": len(both), "accuracy": round(100 * float(np.mean(both)), 2) if both else None}
    result["failures"] = dict(Counter(failure(t) for t, ok in zip(trajectories, right) if not ok).most_common())
    if kb is not None and chains:
        reached = ceiling(kb, questions, cfg)
        result["ceiling"] = round(100 * reached[rows["overall"]].mean(), 2) if rows["overall"].any() else None
        for name, mask in rows.items():
            result[f"ceiling_{name}"] = round(100 * reached[mask].mean(), 2) if mask.any() else None
        pairs = [q for q in questions if q.split == "Compare"]
        if pairs:  # identify both, toss a coin
            result["compare_guess"] = round(50 * float(np.mean([all(found(hop, hits) for hop, hits in zip(q.hops[:2], kb.image_search(list(q.images), 1)))
                                                                for q in pairs])), 2)
    return result


def evaluate(model, processor, kb, questions: list[Question], cfg: RolloutConfig, temperature: float = 0.0, seed: int = 0,
             batch: int = 128, progress: bool = False, go_on=bool) -> tuple[dict, list[Trajectory]]:
    """One response a question, greedy at temperature 0. Returns (summary, trajectories in the questions' order)."""
    model.eval()
    cfg = replace(cfg, group_size=1, temperature=temperature)
    generator, trajectories = torch.Generator(model.sampling_bias.device).manual_seed(seed), []
    for start in tqdm(range(0, len(questions), batch), disable=not progress, desc="evaluate", leave=False):
        trajectories += sample(model, processor, kb, questions[start:start + batch], cfg, generator, go_on)
    return summarize(trajectories, kb, cfg), trajectories


def evaluate_both_ways(model, processor, kb, questions: list[Question], cfg) -> dict:
    """Sampled (temperature 1) and greedy, each rank a share of the questions; the same result on all ranks, as `eval_…`."""
    (rank, ranks), out, started = world(), {"eval_n": len(questions)}, time.time()
    go_on = going_on(model, cfg.gather_weights)
    share = -(-len(questions) // ranks)
    mine = questions[rank * share:(rank + 1) * share]
    padded = (mine + questions)[:share]  # equally many batches on every rank
    with gathered(model, cfg.gather_weights):
        for mode, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            trajectories, problem = [], None
            try:
                trajectories = evaluate(model, processor, kb, padded, cfg, temperature, cfg.seed + rank, cfg.rollout_rows, go_on=go_on)[1]
            except (KnowledgeBaseError, Preempted) as error:
                problem = error
                with suppress(Preempted):
                    go_on(None)
            agree(problem, model.sampling_bias.device)
            result = summarize(all_objects([replace(t, prompt=None) for t in trajectories[:len(mine)]]))
            out |= {f"eval_{mode}_{row}": result[row] for row in ("overall", "bridge", "compare", "bridge_2", "bridge_3", "bridge_4")}
            out |= {f"eval_{mode}_format_rate": result["format_rate"], f"eval_{mode}_tool_calls": result["tool_calls_mean"],
                    f"eval_{mode}_failures": result["failures"]}
    return out | {"eval_format_rate": out["eval_sampled_format_rate"], "eval_seconds": round(time.time() - started, 1)}


def record(t: Trajectory) -> dict:
    """A trajectory as JSON, for predictions.jsonl."""
    return {"id": t.question.id, "prediction": t.answer or "", "trajectory": {
        "problem": t.question.problem, "answer": t.question.answer, "correct": correct(t), "stop": t.stop,
        "turns": [{"thought": turn.thought, "action": turn.action, "argument": turn.argument, "valid": turn.valid,
                   "hits": [[hit.title, hit.text, round(hit.score, 4)] for hit in turn.hits]} for turn in t.turns]}}


def print_table(result: dict, title: str):
    from rich.console import Console
    from rich.table import Table
    table, names = Table(title=title), {"bridge_2": "Bridge, 2 steps", "bridge_3": "Bridge, 3 steps", "bridge_4": "Bridge, 4 steps",
                                        "bridge": "Bridge (3 and 4)", "compare": "Compare", "overall": "Overall"}
    for column in ("", "questions", "accuracy %", "ceiling %", "found at each hop"):
        table.add_column(column, justify="left" if column in ("", "found at each hop") else "right")
    order = [key[2:] for key in result if key.startswith("n_") and key[2:] not in names] + list(names)
    for name, label in ((name, names.get(name, name)) for name in order):
        if result[f"n_{name}"]:
            table.add_row(label, str(result[f"n_{name}"]), f"{result[name]:.1f}", f"{result.get(f'ceiling_{name}', float('nan')):.1f}",
                          "  ".join(f"{x:.2f}" for x in result["chain_recall"].get(name, [])), style="bold" if name == "overall" else None)
    console = Console(width=100)
    console.print(table)
    console.print(f"95% interval of overall: {result['ci95'][0]:.1f}–{result['ci95'][1]:.1f}    format rate {result['format_rate']:.3f}    "
                  f"tool calls {result['tool_calls_mean']:.2f}")
    if "compare_guess" in result:
        both = result["compare_both_retrieved"]
        console.print(f"Compare: naming one of the two pictured at random would give {result['compare_guess']:.1f}; with both values retrieved "
                      f"(n={both['n']}) the policy is right in {both['accuracy'] if both['accuracy'] is not None else float('nan'):.1f}%")
    console.print("wrong answers: " + (", ".join(f"{reason} {count}" for reason, count in result["failures"].items()) or "none"))


def print_trace(t: Trajectory):
    """An episode in the terminal."""
    from rich.console import Console
    from rich.markup import escape
    console = Console(width=120, highlight=False)
    console.print(f"\n[bold]{escape(t.question.problem.replace('<image>', ''))}[/]  [dim]{', '.join(image.name for image in t.question.images)}[/]")
    for turn in t.turns:
        console.print(f"  [italic]{escape(turn.thought)}[/] → [cyan]{turn.action}[/] {escape(turn.argument)}{'' if turn.valid else '  [red]invalid[/]'}")
        for hit in turn.hits:
            console.print(f"      [dim]{hit.score:.2f} {escape(hit.title)}: {escape(hit.text[:90])}[/]")
    mark = "[green]right[/]" if correct(t) else "[red]wrong[/]"
    console.print(f"  {mark}: {escape(t.answer or 'no answer')}    (gold: {escape(t.question.answer)})")


@dataclass
class Args:
    """Evaluate a checkpoint on questions, or score a file of predictions."""
    ckpt: Path | None = None
    data: Path = Path("data/mmhops")   # a folder with the split's questions, or a file of them
    kb: Path = Path("data/kb")
    text_url: str = ""                 # search over HTTP instead: the servers' addresses
    image_url: str = ""
    images: Path | None = None         # INFOSEEK, E-VQA: where their pictures are
    qtypes: Path | None = None         # INFOSEEK: its file of question types
    split: str = "test"
    limit: int | None = None
    shuffle_seed: int | None = None
    max_turns: int | None = None       # the checkpoint's own unless given
    topk: int | None = None
    temperature: float = 0.0           # 0 is greedy
    oracle_image: bool = False         # ablation: image search answers with the gold entity
    seed: int = 0
    batch: int = 128
    traces: int = 5                    # example traces to print
    out: Path | None = None            # results.json and predictions.jsonl; default CKPT-eval beside the checkpoint
    score: Path | None = None          # score this file of predictions by an official metric instead
    references: Path | None = None     # …against these: the benchmark's own file or folder
    benchmark: Literal["mmhops", "infoseek", "evqa"] = "mmhops"
    bem: Path | None = None            # E-VQA: folder of the answer-equivalence classifier


def rollout_config(ckpt: Path) -> RolloutConfig:
    """The rollout settings a checkpoint was trained with, or the paper's."""
    check_name(ckpt)
    path = ckpt / "recipe.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    return RolloutConfig(**{f.name: saved[f.name] for f in fields(RolloutConfig) if f.name in saved})


def score(args: Args):
    import metrics
    if args.references is None:
        raise ValueError("--score needs --references, the benchmark's own file or folder")
    metrics.print_scores(metrics.score_mmhops(args.score, args.references, args.split) if args.benchmark == "mmhops" else
                         metrics.score_infoseek(args.score, args.references, args.qtypes) if args.benchmark == "infoseek" else
                         metrics.score_evqa(args.score, args.references, args.bem))


def main(args: Args):
    if args.score:
        return score(args)
    if args.ckpt is None:
        raise ValueError("say which checkpoint, --ckpt runs/tiny/latest, or which predictions to score, --score FILE")
    cfg = rollout_config(args.ckpt)
    cfg = replace(cfg, oracle_image=args.oracle_image, **{k: v for k, v in (("max_turns", args.max_turns), ("topk", args.topk)) if v is not None})
    questions = load_questions(args.data, args.split, args.limit, args.shuffle_seed, args.images, args.qtypes)
    kb, device = connect(args.kb, args.text_url, args.image_url), "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_policy(args.ckpt, device=device)
    result, trajectories = evaluate(model, processor, kb, questions, cfg, args.temperature, args.seed, args.batch, progress=True)
    result |= {"ckpt": str(args.ckpt), "data": str(args.data), "temperature": args.temperature, "rollout": asdict(cfg)}
    out = args.out or args.ckpt.parent / f"{args.ckpt.name}-eval"
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=1, default=str))
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record(t), ensure_ascii=False) + "\n" for t in trajectories)
    print_table(result, f"{args.ckpt}, {'greedy' if args.temperature == 0 else f'temperature {args.temperature:g}'}, "
                f"T={cfg.max_turns}, top-{cfg.topk}{', ORACLE IMAGES' if cfg.oracle_image else ''}")
    for t in trajectories[:args.traces]:
        print_trace(t)
    print(f"\nwrote {out / 'results.json'} and predictions.jsonl")


if __name__ == "__main__":
    import tyro
    try:
        main(tyro.cli(Args))
    except (DataError, KnowledgeBaseError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
