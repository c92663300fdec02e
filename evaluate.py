"""Evaluation: what fraction of the questions a policy answers, how it searched, where it failed.

    python evaluate.py --ckpt runs/tiny/latest                       # the test questions
    torchrun --nproc_per_node 8 evaluate.py --ckpt runs/paper/latest # a share on each GPU
    python evaluate.py --ckpt runs/tiny/latest --mode static         # as a fixed pipeline
    python evaluate.py --ckpt runs/tiny/latest --temperature 1 --samples 8
    python evaluate.py --base-url http://localhost:8000/v1 --model NAME --mode prompted
    python evaluate.py --compare runs/a/latest-eval runs/b/latest-eval
    python evaluate.py --score predictions.jsonl --references data/MMhops --benchmark mmhops

The figures are explained in evaluation/summary.py, the modes in evaluation/baselines.py, the
official metrics in evaluation/official.py.
"""

import json
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

# before torch: spinning OpenMP threads stall shared machines
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same sums wherever in memory numbers lie

from config import saved_settings
from data import load_questions
from engine import checkpoint, distributed
from engine.distributed import world
from engine.weights import check_name, read_recipe
from evaluation import baselines, official, partial, report, show
from evaluation.ask import answered_batches
from evaluation.summary import compare_results, limits_of, record, revive, summarize
from files.ranges import check_ranges
from files.records import FAULTS, write_jsonl
from files.terminal import fail
from knowledge.client import connect
from model import load_policy
from reward import RewardConfig
from rollout import RolloutConfig


# fmt: off
@dataclass
class Args:
    """Evaluate a policy on questions, compare two evaluations, or score a file of predictions."""

    ckpt: Path | None = None
    base_url: str = ""               # or a model behind an OpenAI-compatible endpoint,
    model: str = ""                  # and its name
    mode: baselines.Mode = "agent"   # see evaluation/baselines.py
    examples: Path | None = None     # prompted: a file of worked examples to show
    captions: Path | None = None     # text-only: {"id", "caption"} per line
    data: Path = Path("data/mmhops")  # a folder with the split's questions, or a file of them
    kb: Path = Path("data/kb")
    text_url: str = ""               # search over HTTP instead: the servers' addresses
    image_url: str = ""
    images: Path | None = None       # INFOSEEK, E-VQA: where their pictures are
    qtypes: Path | None = None       # INFOSEEK: its file of question types
    split: str = "test"
    limit: int | None = None
    shuffle_seed: int | None = None
    max_turns: int | None = None     # the checkpoint's own unless given
    topk: int | None = None
    temperature: float = 0.0         # 0 is greedy
    samples: int = 1                 # responses per question, for pass@k and the majority vote
    oracle_image: bool = False       # ablation: image search answers with the gold entity
    sampler: Literal["shared", "generate"] = "shared"  # who writes the turns: engine/samplers.py
    seed: int = 0
    batch: int = 128                 # responses at once; at most as many as in training
    traces: int = 5                  # responses to print
    out: Path | None = None          # where the files go; default: CKPT-eval, CKPT-eval-static, …
    compare: tuple[Path, Path] | None = None  # two folders that this command wrote
    score: Path | None = None        # score this file of predictions by an official metric instead
    references: Path | None = None   # …against these: the benchmark's own file or folder
    benchmark: Literal["mmhops", "infoseek", "evqa"] = "mmhops"
    bem: Path | None = None          # E-VQA: folder of the answer-equivalence classifier
# fmt: on


def main(args: Args):
    if args.score:
        official.print_scores(score_predictions(args))
    elif args.compare:
        show.print_comparison(*args.compare, compare_results(*args.compare))
    else:
        evaluate_policy(args)


def score_predictions(args: Args) -> dict:
    """The official scores of a file of predictions. Raises ValueError without references."""
    if args.references is None:
        raise ValueError("--score needs --references, the benchmark's own file or folder")
    if args.benchmark == "mmhops":
        return official.score_mmhops(args.score, args.references, args.split)
    if args.benchmark == "infoseek":
        return official.score_infoseek(args.score, args.references, args.qtypes)
    return official.score_evqa(args.score, args.references, args.bem)


def evaluate_policy(args: Args):
    """Ask a checkpoint or an endpoint; write results.json, predictions.jsonl and report.html.

    Each batch is written down when it is finished: an evaluation that was killed goes on where it
    stopped, with as many ranks and the same result. Raises ValueError when it is not clear what to
    evaluate.
    """
    # 1) what is asked of whom
    check(args)
    cfg, reward_cfg = settings(args)
    questions = load_questions(
        args.data, args.split, args.limit, args.shuffle_seed, args.images, args.qtypes
    )
    device = distributed.local_device()
    kb = connect(args.kb, args.text_url, args.image_url, device)
    out = args.out or partial.default_folder(args)
    checkpoint.take(out)
    # what `latest` points to now, on all ranks
    ckpt = distributed.all_objects([partial.resolved(args.ckpt)])[0]
    # no more responses at once than in training, whose memory was planned
    most = read_recipe(ckpt).get("rollout_rows", args.batch) if ckpt else args.batch
    args = replace(args, batch=min(args.batch, most))
    ask, tokenizer = asker(args, ckpt, kb, cfg, device)

    # 2) this rank's share, and what an earlier evaluation with the same settings left of it
    at_once = max(1, args.batch // args.samples)  # questions
    rank, ranks = world()
    starts = range(0, len(questions), at_once)[rank::ranks]
    mine = [question for start in starts for question in questions[start : start + at_once]]
    conditions = partial.conditions_of(args, ckpt, cfg, questions, kb)
    batch = at_once * args.samples  # responses
    unfinished = partial.part_of(out, conditions)
    ids = [question.id for question in mine for _ in range(args.samples)]
    records = partial.resume(unfinished, conditions, ids, batch)

    # 3) ask the rest
    starts = starts[len(records) // batch :]
    for new in answered_batches(ask, questions, at_once, args.seed, device, starts, rank == 0):
        lines = [record(response, reward_cfg, tokenizer) for response in new]
        partial.append(unfinished, lines)
        records += lines

    # 4) count and write, on one rank; each knows the pictures of its own share already
    records = partial.all_in_turn(records, batch)
    limits = partial.all_in_turn(limits_of(kb, mine, cfg), at_once)
    if rank > 0:
        return
    responses = [revive(saved, questions[i // args.samples]) for i, saved in enumerate(records)]
    result = summarize(responses, args.samples, limits)
    name = args.model if args.base_url else str(args.ckpt)
    result |= {"ckpt": name, "temperature": args.temperature, **conditions}
    write_jsonl(out / "predictions.jsonl", records)
    (out / "results.json").write_text(json.dumps(result, indent=1, default=str))
    partial.remove(out, conditions)
    page = report.write(out)

    # 5) show
    drawn = "greedy" if args.temperature == 0 else f"temperature {args.temperature:g}"
    oracle = ", ORACLE IMAGES" if cfg.oracle_image else ""
    title = f"{name}, {args.mode}, {drawn}, T={cfg.max_turns}, top-{cfg.topk}{oracle}"
    show.print_table(result, title)
    for response in responses[:: args.samples][: args.traces]:  # the first of each group
        show.print_response(response)
    print(f"\nwrote {out / 'results.json'}, predictions.jsonl and {page.name}")


def check(args: Args):
    """Refuse flags that do not say what to evaluate, before anything is loaded."""
    if args.base_url and not args.model or not args.ckpt and not args.base_url:
        raise ValueError(
            "say which checkpoint, --ckpt runs/tiny/latest, or which endpoint, "
            "--base-url URL --model NAME; or --compare A B, or --score FILE"
        )
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(
            "--samples above 1 needs a --temperature above 0: greedy responses are all the same"
        )
    if args.ckpt:
        check_name(args.ckpt)


def settings(args: Args) -> tuple[RolloutConfig, RewardConfig]:
    """The checkpoint's own, those of the rollout as the mode and the flags change them."""
    cfg, reward_cfg = saved_settings(args.ckpt)
    examples = args.examples.read_text() if args.examples else ""
    cfg = baselines.settings(args.mode, cfg, examples)
    if args.max_turns is not None and args.mode not in ("direct", *baselines.FIXED):
        cfg = replace(cfg, max_turns=args.max_turns)
    cfg = replace(
        cfg,
        group_size=args.samples,
        temperature=args.temperature,
        topk=cfg.topk if args.topk is None else args.topk,
        oracle_image=args.oracle_image,
        sampler=args.sampler,
    )
    check_ranges(cfg)
    return cfg, reward_cfg


def asker(args: Args, ckpt: Path | None, kb, cfg: RolloutConfig, device: str):
    """(ask, tokenizer): ask(questions, generator) gives responses; an endpoint has no tokenizer."""
    captions = baselines.read_captions(args.captions)
    if args.base_url:
        endpoint = baselines.Endpoint(args.base_url, args.model)

        def ask(questions, generator):
            return baselines.run_endpoint(args.mode, endpoint, kb, questions, cfg, captions)

        return ask, None
    policy = load_policy(ckpt, device=device)
    policy.model.eval()

    def ask(questions, generator):
        return baselines.run(args.mode, policy, kb, questions, cfg, generator, captions)

    return ask, policy.tokenizer


if __name__ == "__main__":
    import tyro

    args = tyro.cli(Args)
    if not args.compare and not args.score:
        distributed.start(timedelta(days=7))  # a rank that is done waits for the slowest one
    try:
        main(args)
    except FAULTS as error:
        fail(error)  # without stop(), in which a rank would wait for those that wait for it
    distributed.stop()
