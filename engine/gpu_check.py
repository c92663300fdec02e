"""The first half hour on a new machine: does it compute what it should, and as fast as it could?

    python -m engine.gpu_check                       # with the tiny policy: minutes
    python -m engine.gpu_check --init Qwen/Qwen2.5-VL-7B-Instruct     # and with a large one
    torchrun --nproc_per_node 8 -m engine.gpu_check  # and eight ranks against one

Each line is a figure, what it should be, and PASS, FAIL or SKIP; all of them go to OUT as JSON.
Needs the built-in knowledge base (`make data`). On a CPU it skips what only a GPU has, and says so.
"""

import copy
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks import memory as counting
from config import PRESETS
from data import load_questions
from engine import checkpoint, cost, distributed, samplers
from engine.packing import padded, vision_inputs
from engine.weights import load_config, load_shards
from files.records import FAULTS
from files.terminal import fail
from knowledge.check import SAME, images_again, texts_again
from knowledge.client import connect
from model import Policy, load_policy, sampled_distribution
from rollout import build_prompt, new_response, sample
from train import Group, update

DRIVER = 580  # of CUDA 13, which the pinned torch is built for
ROWS = (16, 64, 128, 256)  # responses that decode at once
STEPS = 20  # tokens decoded for a timing
LARGE = 1e9  # bytes of weights: reading fewer takes a GPU no time, launching kernels does


@dataclass
class Args:
    """Check this machine; the exit status is 1 where a figure is not what it should be."""

    init: str = PRESETS["tiny"].init  # a large policy is sampled, updated and saved, too
    kb: Path = Path("data/kb")
    data: Path = Path("data/mmhops")
    questions: int = 16
    bandwidth: float = 3.35  # of this GPU's memory, TB/s: for the roofline of decoding
    work: Path = Path("runs/gpu-check")  # checkpoints are tried here
    out: Path = Path("gpu-check.json")


@dataclass
class Figure:
    """A line of the report. value: None where it could not be measured, and `wanted` says why."""

    name: str
    value: float | str | None
    wanted: str
    verdict: str  # PASS, FAIL, SKIP; "" for a figure without a bound


def at_most(name: str, value: float, bound: float) -> Figure:
    """
    >>> at_most("difference", 0.5, 1.0).verdict, at_most("difference", math.nan, 1.0).verdict
    ('PASS', 'FAIL')
    """
    return Figure(name, value, f"≤ {bound:g}", "PASS" if value <= bound else "FAIL")


def at_least(name: str, value: float, bound: float) -> Figure:
    return Figure(name, value, f"≥ {bound:g}", "PASS" if value >= bound else "FAIL")


def true(name: str, found: bool) -> Figure:
    return Figure(name, str(bool(found)), "True", "PASS" if found else "FAIL")


def skipped(name: str, why: str) -> Figure:
    return Figure(name, None, why, "SKIP")


def noted(name: str, value) -> Figure:
    return Figure(name, value, "", "")


# -------------------------------------------------------------------------------------- the machine


def environment(args: Args, device: str) -> list[Figure]:
    import faiss

    found = [noted("torch", torch.__version__), noted("device", name_of(device))]
    if device == "cpu":
        found.append(skipped("driver", "no GPU"))
    else:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(ask, capture_output=True, text=True).stdout.split()
        found.append(at_least("driver", float(answer[0].split(".")[0]), DRIVER))
        found.append(true("computes in bfloat16", torch.cuda.is_bf16_supported()))
    found.append(true("cuDNN's attention is off", not torch.backends.cuda.cudnn_sdp_enabled()))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // local)
    found.append(at_least(f"threads of FAISS, {cores} cores", faiss.omp_get_max_threads(), share))
    counts = cost.parameter_counts(load_config(args.init))
    needed = 3 * 3 * cost.FLOAT32 * counts["all"] / 1e9  # two kept, one written; two moments each
    args.work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.work).free / 1e9
    found.append(at_least("free disk for three checkpoints, GB", round(free, 1), round(needed, 1)))
    return found


def name_of(device: str) -> str:
    return "CPU" if device == "cpu" else torch.cuda.get_device_name()


def retrieval(args: Args, device: str) -> list[Figure]:
    """Some rows of both indexes encoded again; and how long a search takes."""
    kb = connect(args.kb, device=device)
    figures = texts_again(kb) | images_again(kb, args.kb)
    found = [
        at_least(name, value, SAME) if isinstance(value, float) else noted(name, value)
        for name, value in figures.items()
    ]
    started = time.perf_counter()
    kb.text_search([f"capital of country {number}" for number in range(64)], 3)
    found.append(noted("64 text searches, s", round(time.perf_counter() - started, 2)))
    return found


# ------------------------------------------------------------------------------------ tiny: parity


def parity(args: Args, device: str, kb, questions) -> list[Figure]:
    """The tiny policy here against the same policy on the CPU in float32, and against itself."""
    tiny = PRESETS["tiny"]
    cfg = replace(tiny, group_size=2)
    reference = load_policy(tiny.init, torch.float32)
    reference.model.eval()
    expected = sample(reference, kb, questions, cfg, num_greedy=1)  # half of them sampled
    found = []

    # 1) another device
    if device == "cpu":
        found.append(skipped("greedy tokens equal the CPU's", "no GPU"))
        found.append(skipped("greedy tokens, recorded steps or not", "no GPU"))
    else:
        policy = load_policy(tiny.init, torch.float32, device=device)
        policy.model.eval()
        again = sample(policy, kb, questions, cfg, num_greedy=1)
        same = [a.token_ids.equal(b.token_ids) for a, b in zip(again[::2], expected[::2])]
        found.append(true("greedy tokens equal the CPU's", all(same)))
        launched = sample(policy, kb, questions, replace(cfg, graph=False), num_greedy=1)
        same = [a.token_ids.equal(b.token_ids) for a, b in zip(again[::2], launched[::2])]
        found.append(true("greedy tokens, recorded steps or not", all(same)))
        found.append(at_most("log-probs, GPU − CPU", difference(policy, reference, expected), 1e-4))
        found.append(at_most("gradients, GPU − CPU", gradients(policy, reference, expected), 1e-3))

    # 2) other ways to compute the same, on this device
    policy = load_policy(tiny.init, torch.float32, device=device)
    rollout = [r.logprobs[r.policy_mask] for r in expected]
    scored = scores(policy, expected)
    found.append(at_most("log-probs, training − rollout", apart(scored, rollout), 1e-3))
    found.append(
        at_most("log-probs, ours − transformers'", apart(scored, plain(policy, expected)), 1e-3)
    )
    repeated = scores(policy, expected, share_prompt=False)
    found.append(at_most("log-probs, shared − repeated prompt", apart(scored, repeated), 1e-4))
    checkpointed = load_policy(tiny.init, torch.float32, device=device)
    checkpointed.model.gradient_checkpointing_enable({"use_reentrant": False})
    found.append(
        at_most(
            "gradients, checkpointing on − off", gradients(checkpointed, policy, expected), 1e-4
        )
    )
    rounded = load_policy(tiny.init, torch.bfloat16, device=device)
    found.append(
        at_most(
            "log-probs, bfloat16 − float32, mean",
            apart(scores(rounded, expected), scored, torch.mean),
            0.01,
        )
    )
    return found


@torch.no_grad()
def scores(policy: Policy, responses: list, share_prompt: bool = True) -> list[torch.Tensor]:
    """The training pass's log-probs of what each response wrote, on the CPU."""
    policy.model.train()
    logprobs, _ = policy.logprobs(responses, share_prompt=share_prompt)
    return [row[: len(r.token_ids)][r.policy_mask] for row, r in zip(logprobs.cpu(), responses)]


@torch.no_grad()
def plain(policy: Policy, responses: list) -> list[torch.Tensor]:
    """The same by transformers' own forward pass: one response at a time, its own attention."""
    text = policy.model.config.get_text_config()
    text._attn_implementation, ours = "sdpa", text._attn_implementation
    out = []
    for response in responses:
        ids = response.token_ids[None].to(policy.device)
        kinds = (ids == policy.model.config.image_token_id).int()
        policy.model.model.rope_deltas = None  # hidden state of an earlier call
        logits = policy.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            **vision_inputs([response.prompt], policy.device),
        ).logits[0, :-1]
        distribution = sampled_distribution(logits, policy.bias, 1.0)
        chosen = distribution.gather(1, ids[0, 1:, None])[:, 0].cpu()
        out.append(chosen[response.policy_mask[1:]])
    text._attn_implementation = ours
    return out


def apart(one: list, other: list, how=torch.max) -> float:
    """Largest (or otherwise) |difference| of two lists of tensors."""
    return how((torch.cat(one).float() - torch.cat(other).float()).abs()).item()


def difference(policy: Policy, other: Policy, responses: list) -> float:
    return apart(scores(policy, responses), scores(other, responses))


def gradients(policy: Policy, other: Policy, responses: list) -> float:
    """|difference| of two policies' gradients, relative to their size."""
    both = []
    for one in (policy, other):
        one.model.train()
        one.model.zero_grad()
        one.logprobs(responses)[0].sum().backward()
        parts = [p.grad.flatten().cpu() for p in one.model.parameters() if p.grad is not None]
        both.append(torch.cat(parts))
        one.model.zero_grad()
    return ((both[0] - both[1]).norm() / both[1].norm()).item()


# ---------------------------------------------------------------------------------- ranks, updates


def ranks_are_one(args: Args, kb, questions) -> list[Figure]:
    """The gradient's norm of N sharded ranks, and that of one process, for the same responses."""
    rank, ranks = distributed.world()
    name = f"gradient's norm, {ranks} ranks / 1"
    if ranks == 1:
        return [skipped("N ranks are one", "start it with torchrun")]
    cfg = replace(PRESETS["tiny"], group_size=2, updates_per_step=1)
    policy = load_policy(cfg.init, torch.float32)
    policy.model.eval()
    generator = torch.Generator().manual_seed(0)
    count = len(questions) // ranks * ranks
    responses = sample(policy, kb, questions[:count], cfg, generator)
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    groups = [Group(responses[2 * i : 2 * i + 2], rewards) for i in range(count)]
    advantage = 1.0 / math.sqrt(2)  # of a group of two, from mean and sample deviation
    logprobs, _ = policy.logprobs(responses)
    signs = torch.tensor([advantage, -advantage] * count)
    mask = padded([response.policy_mask for response in responses], "cpu")
    (-(logprobs * mask * signs[:, None]).sum() / mask.sum()).backward()
    alone = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), math.inf).item()

    def place(model, name):
        distributed.shard(model, torch.float32, distributed.local_device())
        load_shards(model, name, distributed.local_device())

    device = distributed.local_device()
    sharded = load_policy(cfg.init, torch.float32, "sdpa", device, place)
    optimizer = torch.optim.SGD(sharded.model.parameters(), lr=0.0)
    mine = groups[rank::ranks]
    together = update(sharded, optimizer, mine, replace(cfg, lr=0.0), 0, responses[0])["grad_norm"]
    return [at_most(f"{name} − 1", abs(together / alone - 1), 1e-3)]


def updates(policy: Policy, cfg, responses: list) -> list[Figure]:
    """Seconds of an update: the first, the same again, and one with lengths not seen before."""
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.0)
    size = cfg.group_size
    rewards = torch.arange(size, dtype=torch.float64)
    groups = [Group(responses[i : i + size], rewards) for i in range(0, len(responses), size)]
    cfg = replace(cfg, updates_per_step=1, lr=0.0, recompute_logprobs=False, out=Path("."))
    seconds, norms = [], []
    for which in (groups, groups, groups[: max(1, len(groups) - 1)]):
        started = time.perf_counter()
        figures = update(policy, optimizer, copy.deepcopy(which), cfg, 0, responses[0])
        synchronize(policy.device)
        seconds.append(time.perf_counter() - started)
        norms.append(figures["grad_norm"])
    rest = seconds[2] * len(groups) / max(1, len(groups) - 1)
    return [
        noted("update, first, s", round(seconds[0], 2)),
        noted("update, the same again, s", round(seconds[1], 2)),
        noted("update with new lengths / the same again", round(rest / seconds[1], 2)),
        at_most("its gradient's norm, again / first − 1", abs(norms[1] / norms[0] - 1), 1e-3),
    ]


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------- a large policy


def large(args: Args, device: str, kb, questions) -> list[Figure]:
    """The policy that will be trained, as its preset samples and updates it."""
    tiny = args.init == PRESETS["tiny"].init
    if device == "cpu" and not tiny:
        return [skipped(f"{args.init}", "no GPU")]
    cfg = replace(PRESETS["tiny" if tiny else "small"], max_turns=1, init=args.init)
    cfg = replace(cfg, group_size=8, rollout_rows=len(questions) * 8)
    policy = load_policy(args.init, getattr(torch, cfg.dtype), device=device)
    policy.model.eval()
    found = []

    # 1) what is sampled is what is trained on
    generator = torch.Generator(policy.device).manual_seed(0)
    started = time.perf_counter()
    responses = sample(policy, kb, questions, cfg, generator)
    tokens = sum(int(r.policy_mask.sum()) for r in responses)
    found.append(
        noted("sampled tokens per second", round(tokens / (time.perf_counter() - started)))
    )
    scored = scores_in_parts(policy, responses, cfg)
    rollout = [r.logprobs[r.policy_mask] for r in responses]
    changes = (torch.cat(scored).float() - torch.cat(rollout).float()).abs()
    bound = 1e-3 if cfg.dtype == "float32" else 0.02
    found += [
        at_most("rollout − training, mean", changes.mean().item(), bound),
        noted("rollout − training, 99th percentile", changes.quantile(0.99).item()),
        noted("rollout − training, most", changes.max().item()),
        at_most(
            "training − transformers', mean",
            apart(scored[:8], plain(policy, responses[:8]), torch.mean),
            bound,
        ),
    ]

    # 2) decoding, against reading the weights and the cache once per token
    found += decoding(policy, questions, cfg, args.bandwidth)

    # 3) an update of one question's group
    if tiny:
        found += updates(policy, cfg, responses[:16])
    return found


def scores_in_parts(policy: Policy, responses: list, cfg) -> list[torch.Tensor]:
    """`scores`, a question at a time."""
    size = cfg.group_size
    parts = [scores(policy, responses[i : i + size]) for i in range(0, len(responses), size)]
    return [row for part in parts for row in part]


@torch.no_grad()
def decoding(policy: Policy, questions, cfg, bandwidth: float) -> list[Figure]:
    """Milliseconds per token of so many responses at once, and how often the roofline that is."""
    policy.model.eval()
    text = policy.model.config.get_text_config()
    number = next(policy.model.parameters()).element_size()
    weights = sum(p.numel() for p in policy.model.parameters()) * number
    prompt = build_prompt(policy, questions[0], cfg)
    found = []
    for rows, graph in itertools.product(ROWS, (False, True)):
        if graph and policy.device.type == "cpu":
            continue
        seconds = seconds_per_step(policy, questions[0], prompt, replace(cfg, graph=graph), rows)
        cached = (len(prompt.token_ids) + rows * STEPS) * text.num_hidden_layers
        floor = (weights + 2 * cached * cost.key_width(text) * number) / (bandwidth * 1e12)
        name = f"decoding, {rows} rows{', recorded' if graph else ''}"
        found.append(noted(f"{name}, ms per step", round(1e3 * seconds, 2)))
        if policy.device.type == "cuda" and weights > LARGE:
            bound = 2.0 if graph else 4.0
            found.append(at_most(f"{name}, of the roofline", round(seconds / floor, 2), bound))
    return found


def seconds_per_step(policy: Policy, question, prompt, cfg, rows: int) -> float:
    """Per token of `rows` responses at once: the median of STEPS tokens."""
    responses = [new_response(question, prompt) for _ in range(rows)]
    sampler = samplers.SharedPromptSampler(policy, responses, cfg, None)
    sampler.read_prompts()
    ids = torch.zeros(rows, dtype=torch.long, device=policy.device)
    seconds = []
    for _ in range(STEPS):
        synchronize(policy.device)
        started = time.perf_counter()
        sampler.feed_one(ids, ids + prompt.next_position, ids == 0)
        synchronize(policy.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


class GpuMemory:
    """What benchmarks/memory.py asks of a tracker, by PyTorch's own count on a GPU."""

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        pass

    def peak_of(self, work) -> float:
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()


def memory(args: Args, device: str, questions) -> list[Figure]:
    """GiB of each phase at its worst, caches full, against the plan."""
    on_gpu = torch.device(device).type == "cuda"
    tiny = args.init == PRESETS["tiny"].init
    ranks = distributed.world()[1]
    if not on_gpu and not tiny:
        return [skipped("memory by phase", "no GPU")]
    cfg = replace(PRESETS["tiny" if tiny else "paper" if ranks > 1 else "small"], init=args.init)
    cfg = replace(cfg, out=args.work / "memory")
    before = torch.cuda.memory_allocated() if on_gpu else 0
    policy, *_ = checkpoint.load(cfg, device)
    tracker = GpuMemory() if on_gpu else tracking(policy)
    at_once = min(cfg.rollout_rows, cfg.questions_per_step * cfg.group_size // ranks)
    count = at_once // cfg.group_size
    prompts = [build_prompt(policy, questions[i % len(questions)], cfg) for i in range(count)]
    counted = {"updating": counting.update_bytes(tracker, policy, cfg, prompts[0])}
    counted |= counting.sampling_bytes(tracker, policy, cfg, prompts, nullcontext())
    counts = cost.parameter_counts(policy.model.config)
    plan = cost.memory(cfg, policy.model.config, counts, ranks, min(ranks, 8))
    found = []
    for name, most in counted.items():
        held = most - before + plan["optimizer"]  # the moments come with the first step
        figure = f"{name}, GiB"
        found.append(noted(figure, round(held / cost.GIB, 2)))
        if on_gpu and not tiny:  # the plan's prompts are those of large pictures
            planned = cost.phase_bytes(plan, name.split(":")[0])
            found.append(at_most(f"{figure} / planned", round(held / planned, 3), 1.1))
    shutil.rmtree(cfg.out, ignore_errors=True)
    return found


def tracking(policy: Policy):
    """A count of every storage that is alive; it sees those of the policy, and all new ones."""
    tracker = counting.Tracker()
    for tensor in [*policy.model.parameters(), *policy.model.buffers()]:
        tracker.see(checkpoint.local(tensor))
    return tracker


def saving(args: Args, device: str) -> list[Figure]:
    """A checkpoint written, verified and loaded: seconds, and the same weights."""
    tiny = args.init == PRESETS["tiny"].init
    if device == "cpu" and not tiny:
        return [skipped("save, verify, resume", "no GPU")]
    preset = PRESETS["tiny" if tiny else "paper" if distributed.world()[1] > 1 else "small"]
    cfg = replace(preset, init=args.init, out=args.work / "save", resume=True)
    if distributed.world()[0] == 0:
        shutil.rmtree(cfg.out, ignore_errors=True)
    distributed.barrier()
    found, sums = [], []
    policy, optimizer, *_ = checkpoint.load(cfg, device)
    for name, action in (
        ("save, s", lambda: checkpoint.save(policy, optimizer, cfg, {"step": 1}, [])),
        ("verify and load, s", lambda: checkpoint.load(cfg, device)),
    ):
        started = time.perf_counter()
        result = action()
        found.append(noted(name, round(time.perf_counter() - started, 1)))
        loaded = result[0] if result else policy
        sums.append([checkpoint.local(p).double().sum().item() for p in loaded.model.parameters()])
    found.append(true("loaded weights are the saved ones", sums[0] == sums[1]))
    if distributed.world()[0] == 0:
        shutil.rmtree(cfg.out, ignore_errors=True)
    return found


# -------------------------------------------------------------------------------------- the report


def main(args: Args) -> int:
    """Returns 1 where a figure is not what it should be."""
    device = distributed.local_device()
    rank, _ = distributed.world()
    questions = load_questions(args.data, "validation")[: args.questions]
    kb = connect(args.kb, device=device)
    parts = {
        "environment": lambda: environment(args, device),
        "retrieval": lambda: retrieval(args, device),
        "tiny policy": lambda: parity(args, device, kb, questions),
        "ranks": lambda: ranks_are_one(args, kb, questions),
        args.init: lambda: large(args, device, kb, questions),
        "memory": lambda: memory(args, device, questions),
        "checkpoint": lambda: saving(args, device),
    }
    report = {}
    for part, check in parts.items():
        report[part] = check()
        if rank == 0:
            show(part, report[part])
    verdicts = [figure.verdict for figures in report.values() for figure in figures]
    if rank == 0:
        counted = ", ".join(f"{verdicts.count(v)} {v}" for v in ("PASS", "FAIL", "SKIP"))
        print(f"{counted}; wrote {args.out}")
        figures = {part: [asdict(figure) for figure in of] for part, of in report.items()}
        args.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False))
    return int("FAIL" in verdicts)


def show(part: str, figures: list[Figure]):
    print(part)
    for figure in figures:
        value = figure.value if isinstance(figure.value, str) else number(figure.value)
        print(f"  {figure.verdict:4s}  {figure.name:48s} {value:>12s}  {figure.wanted}", flush=True)


def number(value: float | None) -> str:
    """
    >>> number(None), number(0.000123), number(3.0)
    ('', '0.000123', '3')
    """
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    import tyro

    arguments = tyro.cli(Args)
    distributed.start()
    try:
        status = main(arguments)
    except FAULTS as error:
        fail(error)
    distributed.stop()
    sys.exit(status)
