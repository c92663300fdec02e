"""Train the policy: sample → reward → filter → advantages → update, written out as one loop.

    python train.py                                          # tiny: the whole recipe on a laptop, about ten minutes
    torchrun --nproc_per_node 2 train.py                     # the same on two CPU processes
    torchrun --nproc_per_node 8 train.py paper --kb data/MMhops-KB --data data/MMhops     # the paper's, on 8 GPUs

A step: every rank takes its share of `questions_per_step` questions and writes G responses to each, searching the
knowledge base for real. Groups without a correct response, or whose rewards are all equal, are dropped and replaced
(dynamic sampling); what is sampled beyond the need is carried to the next step. The rest makes `updates_per_step`
optimizer steps. The loss of one optimizer step is a sum over its sampled tokens divided by their number on *all* ranks,
so N ranks compute the gradient that one would.

Everything random is a function of (seed, step, rank), so a run that was killed and resumed is the run that was not.
What is simplified: rollouts and updates alternate on the same devices, there is no separate inference engine.
"""

import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: spinning OpenMP threads stall shared machines
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same sums wherever in memory the numbers lie

import torch
import torch.distributed as dist

import distributed
from config import PRESETS, Config
from dapo import keep_group, overlong_penalty
from data import DataError, load_questions
from distributed import (
    AnotherRankFailed,
    Preempted,
    agree,
    barrier,
    fill,
    gathered,
    going_on,
    reduced,
    shard,
    shard_methods,
    world,
)
from engine import cost
from engine.checkpoint import restore, save, trim_metrics, verify
from engine.logs import open_log
from engine.packing import update
from evaluation import plot
from evaluation.ask import evaluate_both_ways
from evaluation.summary import searches
from knowledge.server import connect
from model import load_policy
from retrieval import KnowledgeBaseError
from reward import reward
from rollout import Response, sample

# ------------------------------------------------------------------------------------------ one step


def collect(
    model, processor, kb, questions, cfg: Config, step: int, surplus: list, go_on=bool
) -> tuple[list, list[Response], list]:
    """Sample until this rank's share of groups is full. Returns (groups, everything sampled, rewards of everything).

    A group is (G responses, their rewards). questions: an endless iterator. surplus, a list of groups, is used up
    first and refilled with what is left over. All ranks sample the same number of rounds. When retrieval fails or SIGTERM
    comes on one rank, all stop together (`agree`).
    """
    (rank, ranks), device = world(), model.sampling_bias.device
    share, at_once = cfg.questions_per_step // ranks, max(1, cfg.rollout_rows // cfg.group_size)
    kept, everything, rewards = list(surplus), [], []
    for refill in range(cfg.max_refills + 1):
        generator = torch.Generator(device).manual_seed(
            ((cfg.seed * 100_003 + step) * 101 + refill) * 1009 + rank
        )
        asked, sampled, problem = [next(questions) for _ in range(share)], [], None
        try:
            for start in range(0, share, at_once):
                sampled += sample(
                    model, processor, kb, asked[start : start + at_once], cfg, generator, go_on
                )
        except (KnowledgeBaseError, Preempted) as error:
            problem = error
            with suppress(Preempted):
                go_on(None)
        agree(problem, device)
        penalties = overlong_penalty(
            torch.tensor([int(t.policy_mask.sum()) for t in sampled]),
            cfg.max_tokens,
            cfg.overlong_buffer,
        )
        scored = [reward(t, cfg, p) for t, p in zip(sampled, penalties.tolist())]
        everything, rewards = everything + sampled, rewards + scored
        outcomes = torch.tensor([r.outcome for r in scored]).view(share, -1)
        totals = torch.tensor([r.total for r in scored]).view(share, -1)
        keep = (
            keep_group(outcomes, totals)
            if cfg.dynamic_sampling
            else torch.ones(share, dtype=torch.bool)
        )
        for i in keep.nonzero().flatten().tolist():
            kept.append((sampled[i * cfg.group_size : (i + 1) * cfg.group_size], totals[i]))
        if reduced(len(kept), device, dist.ReduceOp.MIN) >= share:
            break
    surplus[:] = kept[share:]
    return kept[:share], everything, rewards


# ------------------------------------------------------------------------------------------- the loop


def question_stream(questions: list, cfg: Config, start: int):
    """This rank's questions without end: every epoch in a new order, dealt to the ranks in turn. Yields from position start."""
    rank, ranks = world()
    position = start
    while True:
        epoch, place = divmod(position * ranks + rank, len(questions))
        order = list(range(len(questions)))
        random.Random(f"{cfg.seed} {epoch}").shuffle(order)
        yield questions[order[place]]
        position += 1


def check_config(cfg: Config):
    ranks = world()[1]
    if cfg.questions_per_step % ranks:
        raise ValueError(
            f"--questions-per-step {cfg.questions_per_step} cannot be shared by {ranks} ranks"
        )
    if cfg.group_size < 2:
        raise ValueError(
            f"--group-size {cfg.group_size}: a group needs at least two responses to have an advantage"
        )
    if not cfg.mask_retrieved and not cfg.recompute_logprobs:
        raise ValueError(
            "--no-mask-retrieved needs --recompute-logprobs: the rollout knows no log-probabilities of what it did not sample"
        )
    if cfg.temperature <= 0:
        raise ValueError(
            f"--temperature {cfg.temperature}: training samples, so the temperature must be above 0"
        )
    if (cfg.out / "metrics.jsonl").exists() and not cfg.resume:
        raise ValueError(
            f"{cfg.out} holds a run already; go on with it by --resume, or name another folder with --out"
        )


def build_missing(cfg: Config):
    """The embedded knowledge base and its questions, where the preset's folders are not there yet."""
    import build_kb
    from mmhops import build

    if not (cfg.kb / "manifest.json").exists() and cfg.kb == Path("data/kb") and not cfg.text_url:
        build_kb.build(cfg.kb)
    if not cfg.data.exists() and cfg.data == Path("data/mmhops"):
        build.build(cfg.kb, cfg.data)


def load(cfg: Config, device: str):
    """(model, processor, optimizer, state, surplus, resuming): from OUT/latest where there is something to resume, else from `init`."""
    resuming = cfg.resume and (cfg.out / "latest").exists()
    state, surplus = {"step": 0, "drawn": 0, "seconds": 0.0, "evaluated": -1, "bad": 0}, []
    if resuming:
        state = verify(cfg.out / "latest")
    torch.manual_seed(cfg.seed)  # fresh adapters, the same on every rank
    dtype, sharded = getattr(torch, cfg.dtype), dist.is_initialized() and not cfg.lora_rank

    def place(model, name):
        fill(shard(model, dtype, device, cfg.offload), name, device, cfg.offload)

    model, processor = load_policy(
        cfg.out / "latest" if resuming else cfg.init,
        dtype if cfg.lora_rank else torch.float32,
        cfg.attn,
        device,
        place if sharded else None,
        cfg.lora_rank,
        cfg.freeze_vision,
    )
    if sharded:
        shard_methods(model)
    if cfg.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=cfg.lr,
        betas=(0.9, cfg.beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    return model, processor, optimizer, state, surplus, resuming


def train(cfg: Config):
    check_config(cfg)
    rank, ranks = world()
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if torch.cuda.is_available() else "cpu"
    if rank == 0:
        build_missing(cfg)
    barrier()
    say = print if rank == 0 else (lambda *args, **kwargs: None)
    kb = connect(cfg.kb, cfg.text_url, cfg.image_url, device)
    questions = load_questions(
        cfg.data, "train", cfg.limit, cfg.shuffle_seed, cfg.images, cfg.qtypes
    )
    validation = load_questions(
        cfg.data, "validation", cfg.eval_questions, None, cfg.images, cfg.qtypes
    )
    model, processor, optimizer, state, surplus, resuming = load(cfg, device)
    if resuming:
        surplus = restore(model, processor, optimizer, cfg, {q.id: q for q in questions})
    trim_metrics(cfg, state["step"] if resuming else -1, state["evaluated"])
    counts, peak = cost.parameter_counts(model.config), cost.peak_flops(cfg)
    say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {ranks} × {device}; {len(questions)} questions, "
        f"{kb.sizes[0]} passages, {kb.sizes[1]} images; {'resuming at' if resuming else 'starting at'} step {state['step']}"
    )
    log, go_on, saved = open_log(cfg), going_on(model, cfg.gather_weights), state["step"]

    def evaluation():
        result = evaluate_both_ways(model, processor, kb, validation, cfg)
        state["evaluated"] = state["step"]
        log({"step": state["step"], **result})
        if rank == 0:
            plot.plot_curves((cfg.out,))
        say(
            f"  step {state['step']}: held-out accuracy {result['eval_sampled_overall']}% sampled, {result['eval_greedy_overall']}% greedy "
            f"(Bridge {result['eval_greedy_bridge']}, Compare {result['eval_greedy_compare']}), format {result['eval_format_rate']:.2f}, "
            f"{result['eval_seconds']:.0f} s",
            flush=True,
        )

    def one_step():
        started, stale, searching = time.time(), len(surplus), kb.seconds
        stream = question_stream(questions, cfg, state["drawn"])
        model.eval()
        with gathered(model, cfg.gather_weights):
            groups, sampled, rewards = collect(
                model, processor, kb, stream, cfg, state["step"], surplus, go_on
            )
        rolled = time.time()
        stats = update(model, optimizer, groups, cfg, state["step"], sampled[0], stale)
        now, n = time.time(), reduced(len(sampled), device)
        state["seconds"] = reduced(state["seconds"] + now - started, device, dist.ReduceOp.MAX)
        state["step"], state["drawn"] = (
            state["step"] + 1,
            state["drawn"] + len(sampled) // cfg.group_size,
        )
        state["bad"] = state["bad"] + 1 if stats["updates_skipped"] else 0

        def mean(values):
            return reduced(sum(values), device) / n

        trained = [t for responses, _ in groups for t in responses]
        flops = reduced(cost.update_flops(cfg, model.config, counts, trained), device)
        record = {
            "step": state["step"],
            "reward_mean": mean(r.total for r in rewards),
            "outcome_mean": mean(r.outcome for r in rewards),
            "format_rate": mean(r.format for r in rewards),
            "action_mean": mean(r.action for r in rewards),
            "tool_calls_mean": mean(len(searches(t)) for t in sampled),
            "groups_kept": int(reduced(len(groups), device)),
            "surplus": int(reduced(len(surplus), device)),
            "response_tokens_mean": mean(int(t.policy_mask.sum()) for t in sampled),
            **stats,
            "seconds_rollout": round(rolled - started, 3),
            "seconds_search": round(kb.seconds - searching, 3),
            "seconds_train": round(now - rolled, 3),
            "tokens_per_second": round(
                reduced(sum(int(t.policy_mask.sum()) for t in sampled), device) / (now - started), 1
            ),
        }
        if peak:
            record["mfu"] = round(flops / ((now - rolled) * peak * ranks), 4)
        log(record)
        say(
            f"step {state['step']:4d}/{cfg.steps}  reward {record['reward_mean']:.3f}  accuracy {record['outcome_mean']:.3f}  "
            f"format {record['format_rate']:.3f}  tools {record['tool_calls_mean']:.2f}  kept {record['groups_kept']:2d}  "
            f"entropy {record['entropy']:.3f}  {now - started:.1f} s  (total {state['seconds'] / 60:.1f} min)",
            flush=True,
        )

    def checkpoint():
        nonlocal saved
        save(model, processor, optimizer, cfg, state, surplus)
        saved = state["step"]

    try:
        while True:
            done = (
                state["step"] >= cfg.steps
                or bool(cfg.max_minutes)
                and state["seconds"] >= 60 * cfg.max_minutes
            )
            if state["evaluated"] < state["step"] and (done or state["step"] % cfg.eval_every == 0):
                evaluation()  # before the checkpoint, which remembers that it was done
            if saved != state["step"] and (done or state["step"] % cfg.save_every == 0):
                checkpoint()
            if done:
                break
            one_step()
            if state["bad"] >= cfg.max_bad_steps:
                raise FloatingPointError(
                    f"{state['bad']} steps, one after another, had a loss or gradient that is not finite and were skipped; "
                    f"their batches are {cfg.out}/bad-step-*. Lower --lr, or resume from an older checkpoint"
                )
    except (
        KnowledgeBaseError,
        Preempted,
        AnotherRankFailed,
    ):  # nothing of the finished steps is lost
        if state["step"] != saved or not (cfg.out / "latest").exists():
            checkpoint()
        raise
    say(f"wrote {cfg.out / 'latest'}, {cfg.out / 'metrics.jsonl'} and {cfg.out / 'curves.png'}")


def main():
    import tyro

    if not set(sys.argv[1:2]) & {*PRESETS, "-h", "--help"}:
        sys.argv.insert(1, "tiny")
    cfg = tyro.extras.overridable_config_cli(
        {name: (f"the {name} preset", preset) for name, preset in PRESETS.items()}
    )
    distributed.start()
    distributed.catch_sigterm()
    try:
        cost.show(cfg) if cfg.plan else train(cfg)
    except Preempted:
        print(
            f"stopped by SIGTERM; everything up to the last finished step is in {cfg.out / 'latest'}",
            flush=True,
        )
    except AnotherRankFailed:
        sys.exit(1)
    except (DataError, KnowledgeBaseError, ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
