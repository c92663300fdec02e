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
from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning OpenMP threads stall shared machines
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.distributed as dist

import distributed
import report
from checkpoint import restore, save, trim_metrics
from dapo import group_advantages, keep_group, overlong_penalty, policy_loss
from data import DataError, load_questions
from distributed import barrier, gathered, reduced, shard, world
from evaluate import evaluate_both_ways
from model import load_policy, policy_tokens, token_logprobs
from retrieval import KnowledgeBaseError
from reward import RewardConfig, reward
from rollout import RolloutConfig, Trajectory, sample
from serving import connect


@dataclass
class Config(RolloutConfig, RewardConfig):
    """Defaults are the tiny preset; `paper` changes what it says below."""
    # where things are
    init: str = "assets/tiny-warmstart"   # Hugging Face name or folder of a Qwen2.5-VL
    kb: Path = Path("data/kb")
    text_url: str = ""                    # search over HTTP instead (serving.py): the servers' addresses,
    image_url: str = ""                   # which may be the same
    data: Path = Path("data/mmhops")
    images: Path | None = None            # INFOSEEK, E-VQA: where their pictures are
    qtypes: Path | None = None            # INFOSEEK: its file of question types
    limit: int | None = None              # train on this many questions only,
    shuffle_seed: int | None = None       # drawn with this seed; otherwise the first ones
    out: Path = Path("runs/tiny")
    resume: bool = False                  # go on from OUT/latest; a new folder simply starts
    # how long
    steps: int = 150
    max_minutes: float = 9.5              # stop after this much rollout and update time; 0: no limit
    seed: int = 0
    eval_every: int = 25
    eval_questions: int = 200             # validation questions of the evaluations in between
    save_every: int = 25
    keep: int = 2                         # newest checkpoints to keep
    # sampling (the tiny preset reads short observations: sequence length is what its minutes are spent on)
    max_turn_tokens: int = 48
    max_obs_tokens: int = 84
    max_tokens: int = 600
    topk: int = 2                         # as the authors' training script
    instructions: str = ""
    questions_per_step: int = 16          # over all ranks
    max_refills: int = 0                  # more rounds of sampling when groups were dropped
    # updates
    updates_per_step: int = 2
    micro_batch: int = 32                 # responses a forward pass
    lr: float = 1e-4
    warmup_steps: int = 5
    weight_decay: float = 0.0
    beta2: float = 0.99
    max_grad_norm: float = 1.0
    eps_low: float = 0.2
    eps_high: float = 0.28
    recompute_logprobs: bool = False      # score old log-probs with the training forward instead of the rollout's own
    dynamic_sampling: bool = True         # ablation: keep every group
    # numerics
    dtype: str = "float32"                # compute; master weights are always float32
    attn: str = "sdpa"
    activation_checkpointing: bool = False


PRESETS = {
    "tiny": Config(),
    "paper": Config(
        init="Qwen/Qwen2.5-VL-7B-Instruct", kb=Path("data/MMhops-KB"), data=Path("data/MMhops"), out=Path("runs/paper"),
        steps=85, max_minutes=0, eval_every=10, eval_questions=256, save_every=5,            # 1 epoch of 21,777 questions
        max_turn_tokens=512, max_obs_tokens=1024, max_tokens=4096, topk=3, top_p=0.99,       # top-p: authors' development code
        instructions=RolloutConfig.instructions, questions_per_step=256, max_refills=10,     # 256 prompts x 8, refilled up to 10 times
        updates_per_step=4, micro_batch=1, lr=1e-6, warmup_steps=0, weight_decay=1e-2, beta2=0.999,  # 4 updates of 64 prompts, AdamW, no warm-up
        recompute_logprobs=True, dtype="bfloat16", activation_checkpointing=True)}


# ------------------------------------------------------------------------------------------ one step

def collect(model, processor, kb, questions, cfg: Config, step: int, surplus: list) -> tuple[list, list[Trajectory], list]:
    """Sample until this rank's share of groups is full. Returns (groups, everything sampled, rewards of everything).

    A group is (G trajectories, their rewards). questions: an endless iterator. surplus, a list of groups, is used up
    first and refilled with what is left over. All ranks sample the same number of rounds.
    """
    rank, ranks = world()
    share, device = cfg.questions_per_step // ranks, model.sampling_bias.device
    kept, everything, rewards = list(surplus), [], []
    for refill in range(cfg.max_refills + 1):
        generator = torch.Generator(device).manual_seed(((cfg.seed * 100_003 + step) * 101 + refill) * 1009 + rank)
        asked, problem = [next(questions) for _ in range(share)], None
        try:
            sampled = sample(model, processor, kb, asked, cfg, generator)
        except KnowledgeBaseError as error:  # a retrieval server died: all ranks stop together
            problem = error
        if reduced(problem is not None, device):
            raise problem or KnowledgeBaseError("the retrieval of another rank failed")
        penalties = overlong_penalty(torch.tensor([int(t.policy_mask.sum()) for t in sampled]), cfg.max_tokens, cfg.overlong_buffer)
        scored = [reward(t, cfg, p) for t, p in zip(sampled, penalties.tolist())]
        everything, rewards = everything + sampled, rewards + scored
        outcomes = torch.tensor([r.outcome for r in scored]).view(share, -1)
        totals = torch.tensor([r.total for r in scored]).view(share, -1)
        keep = keep_group(outcomes, totals) if cfg.dynamic_sampling else torch.ones(share, dtype=torch.bool)
        for i in keep.nonzero().flatten().tolist():
            kept.append((sampled[i * cfg.group_size:(i + 1) * cfg.group_size], totals[i]))
        if reduced(len(kept), device, dist.ReduceOp.MIN) >= share:
            break
    surplus[:] = kept[share:]
    return kept[:share], everything, rewards


def update(model, optimizer, groups: list, cfg: Config, step: int = 0, spare: Trajectory | None = None,
           stale: int = 0) -> dict:
    """`updates_per_step` optimizer steps on this rank's groups. Returns means over them, the same on all ranks.

    spare: any response, for a rank that has nothing to do while others have. stale: how many of the groups, the first
    ones, were sampled by an earlier policy: they keep its log-probs, and `logprob_diff_max` (rollout against training
    forward) leaves them out.
    Raises FloatingPointError, before the weights are touched, when the gradient is not finite.
    """
    device, (_, ranks) = model.sampling_bias.device, world()
    model.train()
    responses = [(t, a) for trajectories, totals in groups for t, a in zip(trajectories, group_advantages(totals[None])[0].tolist())]
    fresh = {id(t) for trajectories, _ in groups[stale:] for t in trajectories}
    if cfg.recompute_logprobs:
        rescore(model, [t for t, _ in responses if id(t) in fresh], spare, cfg)
    stats = {"loss": 0.0, "grad_norm": 0.0, "entropy": 0.0, "clip_fraction": 0.0, "logprob_diff_max": 0.0}
    for number in range(cfg.updates_per_step):
        part = [pair for g in range(number, len(groups), cfg.updates_per_step) for pair in responses[g * cfg.group_size:(g + 1) * cfg.group_size]]
        part.sort(key=lambda pair: len(pair[0].token_ids))
        tokens = reduced(sum(int(t.policy_mask.sum()) for t, _ in part), device)
        if tokens == 0:
            continue
        # Every rank must run equally many micro-batches: its collectives would otherwise wait for ever.
        batches = [part[i:i + cfg.micro_batch] for i in range(0, len(part), cfg.micro_batch)]
        batches += [[]] * (int(reduced(len(batches), device, dist.ReduceOp.MAX)) - len(batches))
        for batch in batches:  # an empty one scores the spare response, and adds nothing to the loss
            trajectories, advantages = [t for t, _ in batch] or [spare], torch.tensor([a for _, a in batch] or [0.0], device=device)
            logprobs, entropy = token_logprobs(model, trajectories, cfg.temperature)
            mask = policy_tokens(trajectories, device) & bool(batch)
            old = torch.nn.utils.rnn.pad_sequence([t.logprobs for t in trajectories], batch_first=True).to(device)
            loss, sums = policy_loss(logprobs, old, advantages, mask, cfg.eps_low, cfg.eps_high, num_tokens=tokens)
            (loss * ranks).backward()  # FSDP averages gradients over ranks; the loss is a part of one global sum
            stats["loss"] += loss.item()
            stats["entropy"] += (entropy * mask).sum().item() / tokens
            stats["clip_fraction"] += sums["clipped"] / tokens
            if number == 0:
                compared = mask & torch.tensor([[id(t) in fresh] for t in trajectories], device=device)
                stats["logprob_diff_max"] = max(stats["logprob_diff_max"], ((logprobs - old).abs() * compared).max().item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not norm < float("inf"):
            raise FloatingPointError(f"the gradient of step {step} is not finite; the weights were not touched. "
                                     f"Lower --lr, or go on from the last checkpoint with --resume")
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
        optimizer.step()
        optimizer.zero_grad()
        stats["grad_norm"] += norm
    stats = {k: v if k in ("logprob_diff_max", "grad_norm") else reduced(v, device) for k, v in stats.items()}
    stats["logprob_diff_max"] = reduced(stats["logprob_diff_max"], device, dist.ReduceOp.MAX)
    return {k: v if k == "logprob_diff_max" else v / cfg.updates_per_step for k, v in stats.items()}


@torch.no_grad()
def rescore(model, trajectories: list[Trajectory], spare: Trajectory, cfg: Config):
    """Replace stored log-probs by those of the training forward pass; all ranks run the same number of passes."""
    passes = int(reduced(-(-len(trajectories) // cfg.micro_batch), model.sampling_bias.device, dist.ReduceOp.MAX))
    for i in range(passes):
        batch = trajectories[i * cfg.micro_batch:(i + 1) * cfg.micro_batch] or [spare]
        for t, logprobs in zip(batch, token_logprobs(model, batch, cfg.temperature)[0]):
            t.logprobs = logprobs[:len(t.token_ids)].cpu()


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
        raise ValueError(f"--questions-per-step {cfg.questions_per_step} cannot be shared by {ranks} ranks")
    if cfg.group_size < 2:
        raise ValueError(f"--group-size {cfg.group_size}: a group needs at least two responses to have an advantage")
    if cfg.temperature <= 0:
        raise ValueError(f"--temperature {cfg.temperature}: training samples, so the temperature must be above 0")
    if (cfg.out / "metrics.jsonl").exists() and not cfg.resume:
        raise ValueError(f"{cfg.out} holds a run already; go on with it by --resume, or name another folder with --out")


def build_missing(cfg: Config):
    """The embedded knowledge base and its questions, where the preset's folders are not there yet."""
    import build_kb
    import build_mmhops
    if not (cfg.kb / "manifest.json").exists() and cfg.kb == Path("data/kb") and not cfg.text_url:
        build_kb.build(cfg.kb)
    if not cfg.data.exists() and cfg.data == Path("data/mmhops"):
        build_mmhops.build(cfg.kb, cfg.data)


def train(cfg: Config):
    check_config(cfg)
    rank, ranks = world()
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if torch.cuda.is_available() else "cpu"
    if rank == 0:
        build_missing(cfg)
    barrier()
    say = print if rank == 0 else (lambda *args, **kwargs: None)
    kb, questions = connect(cfg.kb, cfg.text_url, cfg.image_url, device), load_questions(cfg.data, "train", cfg.limit, cfg.shuffle_seed, cfg.images, cfg.qtypes)
    validation = load_questions(cfg.data, "validation", cfg.eval_questions, None, cfg.images, cfg.qtypes)
    resuming = cfg.resume and (cfg.out / "latest").exists()
    model, processor = load_policy(cfg.out / "latest" if resuming else cfg.init, torch.float32, cfg.attn, device)
    if cfg.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if ranks > 1:
        shard(model, getattr(torch, cfg.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
    state, surplus = {"step": 0, "drawn": 0, "seconds": 0.0}, []
    if resuming:
        state, surplus = restore(model, processor, optimizer, cfg, {q.id: q for q in questions})
    if cfg.resume:
        trim_metrics(cfg, state["step"] if resuming else -1)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters on {ranks} × {device}; {len(questions)} questions, "
        f"{kb.sizes[0]} passages, {kb.sizes[1]} images; {'resuming at' if resuming else 'starting at'} step {state['step']}")

    cfg.out.mkdir(parents=True, exist_ok=True)

    def log(record: dict):
        if rank == 0:
            with open(cfg.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def evaluation():
        result = evaluate_both_ways(model, processor, kb, validation, cfg)
        log({"step": state["step"], **result})
        if rank == 0:
            report.plot_curves([cfg.out])
        say(f"  step {state['step']}: held-out accuracy {result['eval_sampled_overall']}% sampled, {result['eval_greedy_overall']}% greedy "
            f"(Bridge {result['eval_greedy_bridge']}, Compare {result['eval_greedy_compare']}), format {result['eval_format_rate']:.2f}, "
            f"{result['eval_seconds']:.0f} s", flush=True)

    if not resuming:
        evaluation()
    while state["step"] < cfg.steps and (not cfg.max_minutes or state["seconds"] < 60 * cfg.max_minutes):
        started, stale = time.time(), len(surplus)
        stream = question_stream(questions, cfg, state["drawn"])
        model.eval()
        try:
            with gathered(model):
                searching = kb.seconds
                groups, sampled, rewards = collect(model, processor, kb, stream, cfg, state["step"], surplus)
        except KnowledgeBaseError:  # nothing of the finished steps is lost
            if state["step"] and not (cfg.out / f"step-{state['step']:06d}").exists():
                save(model, processor, optimizer, cfg, state, surplus)
            raise
        drawn = len(sampled) // cfg.group_size
        rolled = time.time()
        stats = update(model, optimizer, groups, cfg, state["step"], sampled[0], stale)
        now = time.time()
        tokens = sum(int(t.policy_mask.sum()) for t in sampled)
        state["seconds"] = reduced(state["seconds"] + now - started, device, dist.ReduceOp.MAX)
        state["step"], state["drawn"] = state["step"] + 1, state["drawn"] + drawn
        n = reduced(len(sampled), device)

        def mean(values):
            return reduced(sum(values), device) / n

        record = {"step": state["step"], "reward_mean": mean(r.total for r in rewards), "outcome_mean": mean(r.outcome for r in rewards),
                  "format_rate": mean(r.format for r in rewards), "action_mean": mean(r.action for r in rewards),
                  "tool_calls_mean": mean(sum(turn.valid and turn.action != "answer" for turn in t.turns) for t in sampled),
                  "groups_kept": int(reduced(len(groups), device)), "surplus": int(reduced(len(surplus), device)),
                  "response_tokens_mean": mean(int(t.policy_mask.sum()) for t in sampled), **stats,
                  "seconds_rollout": round(rolled - started, 3), "seconds_search": round(kb.seconds - searching, 3),
                  "seconds_train": round(now - rolled, 3), "tokens_per_second": round(reduced(tokens, device) / (now - started), 1)}
        log(record)
        say(f"step {state['step']:4d}/{cfg.steps}  reward {record['reward_mean']:.3f}  accuracy {record['outcome_mean']:.3f}  format {record['format_rate']:.3f}  "
            f"tools {record['tool_calls_mean']:.2f}  kept {record['groups_kept']:2d}  entropy {record['entropy']:.3f}  "
            f"{now - started:.1f} s  (total {state['seconds'] / 60:.1f} min)", flush=True)
        done = state["step"] == cfg.steps or cfg.max_minutes and state["seconds"] >= 60 * cfg.max_minutes
        if done or state["step"] % cfg.eval_every == 0:
            evaluation()  # before the checkpoint: what a kill loses is then done again, not left out
        if done or state["step"] % cfg.save_every == 0:
            save(model, processor, optimizer, cfg, state, surplus)
    say(f"wrote {cfg.out / 'latest'}, {cfg.out / 'metrics.jsonl'} and {cfg.out / 'curves.png'}")


def main():
    import tyro
    if not set(sys.argv[1:2]) & {*PRESETS, "-h", "--help"}:
        sys.argv.insert(1, "tiny")
    cfg = tyro.extras.overridable_config_cli({name: (f"the {name} preset", preset) for name, preset in PRESETS.items()})
    distributed.start()
    try:
        train(cfg)
    except (DataError, KnowledgeBaseError, ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
