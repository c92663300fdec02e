"""Train the policy: sample → reward → filter → advantages → loss → step, written out as one loop.

    python train.py                               # tiny: the whole recipe, on a laptop
    torchrun --nproc_per_node 2 train.py          # the same on two CPU processes
    torchrun --nproc_per_node 8 train.py paper --kb data/MMhops-KB --data data/MMhops

N ranks compute the gradient that one would: the loss of an optimizer step is a sum over its sampled
tokens divided by their number on *all* ranks. Everything random is a function of (seed, step,
rank), so a run that was killed and resumed gives the figures of one that was not. What is
simplified: sampling and updating alternate, by default on the same devices.
"""

import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning OpenMP threads stall shared machines
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same sums wherever in memory numbers lie

import torch
import torch.distributed as dist
from torch import Tensor

import dapo
from config import PRESETS, Config, check_config
from data import Question, Stream
from engine import checkpoint, cost, distributed, packing, served
from engine.distributed import AnotherRankFailed, Preempted, alone, gathered, reduced, world
from engine.logs import open_log
from engine.packing import padded
from engine.pictures import readable, without_long
from evaluation import baselines, progress
from evaluation.ask import evaluate_both_ways
from evaluation.plot import plot_curves
from files.records import FAULTS
from files.terminal import fail
from knowledge.client import connect
from model import Policy
from retrieval import KnowledgeBaseError
from reward import reward
from rollout import Response, build_prompt, sample


class Group(NamedTuple):
    """A question's G responses, and their total rewards (G,)."""

    responses: list[Response]
    rewards: Tensor


@dataclass
class Run:
    """What a run carries from step to step; a checkpoint keeps all of it."""

    step: int = 0  # steps finished
    drawn: int = 0  # questions this rank has asked
    seconds: float = 0.0  # of sampling and updating, on the slowest rank
    evaluated: int = -1  # the step of the latest evaluation
    bad: int = 0  # steps in a row with an optimizer step that was skipped
    surplus: list[Group] = field(default_factory=list)  # sampled beyond the need

    def counters(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "surplus"}


# -------------------------------------------------------------------- sample → reward → filter


def collect(
    policy: Policy, kb, questions, cfg: Config, run: Run, any_left=alone
) -> tuple[list[Group], list[Response], list[dict]]:
    """At most this rank's share of groups; and all that was sampled, with its rewards.

    questions: an iterator without end. Groups that teach nothing are dropped (dynamic sampling).
    All ranks sample round after round, max_refills + 1 at most, until each has its share. Of what
    is beyond it the newest, at most a share, wait in run.surplus. Rewards: of dropped groups, too.
    """
    rank, ranks = world()
    share = cfg.questions_per_step // ranks
    groups, sampled, rewards = run.surplus, [], []
    served.hand_over(policy, cfg, run.step)  # to inference servers, where they sample
    for attempt in range(cfg.max_refills + 1):
        # one seed per (seed, step, attempt, rank)
        seed = ((cfg.seed * 100_003 + run.step) * 101 + attempt) * 1009 + rank
        asked = [next(questions) for _ in range(share)]
        new = sample_all(policy, kb, asked, cfg, seed, any_left)
        new_rewards = rewards_of(new, cfg)
        groups = groups + informative(new, new_rewards, cfg)  # a new list: a stop saves the old
        sampled += new
        rewards += new_rewards
        if reduced(len(groups), policy.device, dist.ReduceOp.MIN) >= share:
            break
    run.surplus = groups[share:][-share:] if cfg.keep_surplus else []
    return groups[:share], sampled, rewards


def sample_all(policy: Policy, kb, questions, cfg: Config, seed: int, any_left) -> list[Response]:
    """G responses per question, at most rollout_rows at once; all ranks succeed, or all stop."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    at_once = max(1, cfg.rollout_rows // cfg.group_size)
    responses = []
    with distributed.all_or_none(any_left, policy.device, KnowledgeBaseError):
        for start in range(0, len(questions), at_once):
            some = questions[start : start + at_once]
            responses += sample(policy, kb, some, cfg, generator, any_left)
    return responses


def rewards_of(responses: list[Response], cfg: Config) -> list[dict[str, float]]:
    """The reward's terms of each response. Only what was sampled costs length."""
    lengths = torch.tensor([int(response.policy_mask.sum()) for response in responses])
    penalties = dapo.overlong_penalty(lengths, cfg.max_tokens, cfg.overlong_buffer)
    return [reward(r, cfg, penalty) for r, penalty in zip(responses, penalties.tolist())]


def informative(responses: list[Response], rewards: list[dict], cfg: Config) -> list[Group]:
    """The groups from which something can be learned."""
    size = cfg.group_size
    outcomes = torch.tensor([terms["outcome"] for terms in rewards]).view(-1, size)
    totals = torch.tensor([terms["total"] for terms in rewards]).view(-1, size)
    keep = dapo.keep_group(outcomes, totals).tolist()
    return [
        Group(responses[i * size : (i + 1) * size], totals[i])
        for i in range(len(totals))
        if keep[i] or not cfg.dynamic_sampling
    ]


# -------------------------------------------------------------------- advantages → loss → step


def update(
    policy: Policy,
    optimizer,
    groups: list[Group],
    cfg: Config,
    step: int = 0,
    filler: Response | None = None,
    carried: int = 0,
) -> dict[str, float]:
    """`updates_per_step` optimizer steps on this rank's groups; their figures' means, on all ranks.

    filler: any response, for a rank that has nothing to do while others have. carried: so many of
    the groups, the first ones, an earlier policy sampled. They keep its log-probs and stay out of
    `logprob_diff_…` (rollout against training), unless all groups are scored again.
    `updates_skipped`: optimizer steps not taken because the loss or gradient was not finite.
    """
    device = policy.device
    rank, ranks = world()
    policy.model.train()

    if not cfg.mask_retrieved:
        groups = [Group(packing.unmasked(responses), rewards) for responses, rewards in groups]
    carried = carried if cfg.mask_retrieved and cfg.sampler != "endpoint" else 0  # 0: score all
    # 1) Advantages, relative to the group. Groups of one are one group together, over all ranks.
    baseline = None
    if cfg.group_size == 1:
        baseline = torch.tensor([distributed.all_objects([r.item() for _, r in groups])])  # (1, N)
    pairs = []  # of each group: [(response, advantage)]
    for responses, rewards in groups:
        advantages = dapo.group_advantages(rewards[None], baseline)[0].tolist()
        pairs.append(list(zip(responses, advantages)))

    # 2) Old log-probs: the rollout's own, or replaced in place by the training forward pass's.
    fresh = [response for group in groups[carried:] for response in group.responses]
    differences = packing.rescore(policy, fresh, filler, cfg) if cfg.recompute_logprobs else []
    fresh_ids = {id(response) for response in fresh}

    # 3) Optimizer steps; groups are dealt to them in turn.
    done = skipped = 0
    totals = dict.fromkeys(("loss", "grad_norm", "entropy", "clip_fraction"), 0.0)
    for number in range(cfg.updates_per_step):
        batch = sum(pairs[number :: cfg.updates_per_step], [])
        tokens = reduced(sum(int(r.policy_mask.sum()) for r, _ in batch), device)
        count = reduced(len(batch), device)
        if tokens == 0:  # on all ranks
            continue
        figures = {"loss": 0.0, "entropy": 0.0, "clip_fraction": 0.0}
        for part in packing.micro_batches(batch, cfg.micro_tokens, device, cfg.share_prompt):
            loss, found, changes = loss_of(policy, part, cfg, tokens, count, filler)
            (loss * ranks).backward()  # FSDP averages over ranks; the loss is a part of one sum
            figures = {name: value + found[name] for name, value in figures.items()}
            if number == 0 and not cfg.recompute_logprobs:  # still the policy that sampled
                differences += [c for (r, _), c in zip(part, changes) if id(r) in fresh_ids]
        figures = {name: reduced(value, device) for name, value in figures.items()}
        figures["grad_norm"] = distributed.clip_gradients(policy.model, cfg.max_grad_norm)
        if all(map(math.isfinite, figures.values())):
            for parameters in optimizer.param_groups:
                parameters["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
            optimizer.step()
            totals = {name: value + figures[name] for name, value in totals.items()}
            done += 1
        else:  # on all ranks alike
            packing.save_batch(batch, cfg.out, f"{step + 1:06d}-{number}-rank{rank}")
            skipped += 1
        optimizer.zero_grad()
    means = {name: value / max(1, done) for name, value in totals.items()}
    return means | packing.difference_figures(differences, device) | {"updates_skipped": skipped}


def loss_of(policy: Policy, batch: list, cfg: Config, tokens: float, count: float, filler) -> tuple:
    """A micro-batch's part of an optimizer step's loss; figures; each response's |Δlog-probs|.

    batch: [(response, advantage)]; an empty one scores the filler, and adds nothing. tokens, count:
    sampled tokens and responses of the whole optimizer step.
    """
    responses = [response for response, _ in batch] or [filler]
    advantages = torch.tensor([a for _, a in batch] or [0.0], device=policy.device)
    logprobs, entropies = policy.logprobs(responses, cfg.temperature, cfg.share_prompt)  # (N, L)
    mask = padded([r.policy_mask for r in responses], policy.device) & bool(batch)
    old = padded([r.logprobs for r in responses], policy.device)
    weights = [torch.ones_like(r.logprobs) if r.weights is None else r.weights for r in responses]
    weights = padded(weights, policy.device)
    if not cfg.token_level_loss:
        weights = weights * dapo.response_level_weights(mask, tokens, count)
    loss, figures = dapo.policy_loss(
        logprobs, old, advantages, mask, cfg.eps_low, cfg.eps_high, tokens, weights, cfg.dual_clip
    )
    figures |= {"loss": loss.item(), "entropy": (entropies * mask).sum().item() / tokens}
    changes = [row[written] for row, written in zip((logprobs - old).detach().abs(), mask)]
    return loss, figures, changes


# ------------------------------------------------------------------------------------- the loop


def train(cfg: Config):
    # 1) What a run needs.
    rank, ranks = world()
    check_config(cfg, ranks)
    device = distributed.local_device()
    if rank == 0:
        build_missing(cfg)
    distributed.barrier()
    say = print if rank == 0 else (lambda *args, **kwargs: None)
    kb = connect(cfg.kb, cfg.text_url, cfg.image_url, device, cfg.index_device)
    cfg = baselines.settings(cfg.mode, cfg)  # --mode text-only trains a baseline
    questions, validation = baselines.load_both(cfg)
    policy, optimizer, run = start_run(cfg, device, questions)
    questions = without_long(policy.processor, questions, cfg, say)
    stream = Stream(questions, cfg.seed, run.drawn, rank, ranks, readable)
    log = open_log(cfg)
    any_left = distributed.make_any_left(policy, cfg.gather_weights)
    say(progress.start_line(policy, kb, questions, run))

    # 2) The loop.
    saved = run.step
    try:
        while True:
            out_of_time = cfg.max_minutes and run.seconds >= 60 * cfg.max_minutes
            done = run.step >= cfg.steps or out_of_time
            if run.evaluated < run.step and (done or run.step % cfg.eval_every == 0):
                result = evaluate_both_ways(policy, kb, validation, cfg)
                if run.evaluated < 0:  # once per run
                    log(progress.landmarks(kb, validation, cfg, device))
                run.evaluated = run.step  # before the checkpoint, which remembers it
                log({"step": run.step, **result})
                say(progress.evaluation_line(run, result), flush=True)
            if saved < run.step and (done or run.step % cfg.save_every == 0):
                checkpoint.save(policy, optimizer, cfg, run.counters(), run.surplus)
                saved = run.step
                if rank == 0:
                    plot_curves((cfg.out,))
            if done:
                break
            started, searching = time.monotonic(), kb.seconds
            carried = len(run.surplus)  # the first groups of this step: an earlier policy's
            # sample → reward → filter
            policy.model.eval()
            with gathered(policy.model, cfg.gather_weights):
                groups, sampled, rewards = collect(policy, kb, stream, cfg, run, any_left)
            middle = time.monotonic()
            # advantages → loss.backward() → optimizer.step()
            figures = update(policy, optimizer, groups, cfg, run.step, sampled[0], carried)
            ended = time.monotonic()
            # log
            run.step += 1
            run.drawn = stream.drawn
            run.seconds = reduced(run.seconds + ended - started, device, dist.ReduceOp.MAX)
            run.bad = run.bad + 1 if figures["updates_skipped"] else 0
            took = (middle - started, kb.seconds - searching, ended - middle)
            record = progress.step_record(policy, cfg, run, groups, sampled, rewards, figures, took)
            log(record)
            say(progress.step_line(record, cfg, run, ended - started), flush=True)
            if run.bad >= cfg.max_bad_steps:
                raise FloatingPointError(packing.not_finite(run, cfg))
    except (KnowledgeBaseError, Preempted, AnotherRankFailed):  # no finished step is lost
        if saved < run.step or not (cfg.out / "latest").exists():
            checkpoint.save(policy, optimizer, cfg, run.counters(), run.surplus)
        raise
    say(progress.end_line(run, cfg))


# ---------------------------------------------------------------------------- before the loop


def build_missing(cfg: Config):
    """The built-in knowledge base and its questions, where these folders are not there yet."""
    import build_kb
    import mmhops.build

    if cfg.kb == Path("data/kb") and not cfg.text_url and not (cfg.kb / "manifest.json").exists():
        build_kb.build(cfg.kb)
    if cfg.data == Path("data/mmhops") and not cfg.data.exists():
        mmhops.build.build(cfg.kb, cfg.data)


def start_run(cfg: Config, device: str, questions: list[Question]) -> tuple:
    """(policy, optimizer, run), new or resumed."""
    policy, optimizer, counters, surplus = checkpoint.load(cfg, device)
    run = Run(**counters)
    by_id = {question.id: question for question in questions}
    for name, parts, rewards in surplus:
        if name not in by_id:  # of other --data
            continue
        prompt = build_prompt(policy, by_id[name], cfg)
        responses = [Response(by_id[name], prompt, *tensors) for tensors in parts]
        run.surplus.append(Group(responses, rewards))
    return policy, optimizer, run


def main():
    import tyro

    if not set(sys.argv[1:2]) & {*PRESETS, "-h", "--help"}:  # no preset is named
        sys.argv.insert(1, "tiny")
    described = {name: (f"the {name} preset", preset) for name, preset in PRESETS.items()}
    cfg = tyro.extras.overridable_config_cli(described)
    distributed.start()
    distributed.catch_signals()
    try:
        command = cost.show if cfg.plan else train
        command(cfg)
    except Preempted:
        print(f"stopped by a signal; every finished step is in {cfg.out / 'latest'}", flush=True)
    except AnotherRankFailed:
        sys.exit(1)
    except FAULTS as error:
        fail(error)  # without stop(), in which a rank would wait for those that wait for it
    distributed.stop()


if __name__ == "__main__":
    main()
