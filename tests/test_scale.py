"""At scale: N ranks make the step of one, memory stays bounded, what is not finite is skipped, a
signal loses nothing.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, WARMSTART, free_port, start_forkserver
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import model as model_module
import train as train_module
from config import PRESETS, check_config
from data import load_questions
from engine import checkpoint, cost, distributed
from engine.distributed import alone, clip_gradients
from engine.packing import micro_batches, pack
from engine.weights import load_shards
from evaluation.progress import landmarks
from model import load_policy
from retrieval import KnowledgeBase, KnowledgeBaseError
from rollout import sample
from train import Group, update

CFG = replace(
    PRESETS["tiny"], group_size=4, updates_per_step=1, micro_tokens=1500, lr=0.05, warmup_steps=0
)


@pytest.fixture(scope="module")
def groups(policy, kb, mixed, text_only):
    """Eight groups with pictures and one without, their rewards drawn at random so that every one
    has a gradient.
    """
    asked = [*mixed, text_only]
    responses = sample(policy, kb, asked, CFG, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(len(asked), 4, generator=generator, dtype=torch.float64)
    return [Group(responses[4 * i : 4 * i + 4], rewards[i]) for i in range(len(asked))]


@pytest.fixture(scope="module")
def responses(groups):
    return [response for group in groups for response in group.responses]


# ----------------------------------------------------------------------------- N ranks are one


def shard_in(dtype):
    """What load_policy is given to shard a model and fill it."""

    def place(model, name):
        distributed.shard(model, dtype)
        load_shards(model, name, "cpu")

    return place


def two_steps(share: list, filler, lora_rank: int = 0, cfg=CFG) -> tuple[list, dict]:
    """[loss, gradient norm, entropy] of two SGD steps in float64 on this rank's share of the
    groups, and {weight: its change}.
    """
    torch.manual_seed(0)
    sharded = dist.is_initialized() and not lora_rank
    place = shard_in(torch.float64) if sharded else None
    policy = load_policy(WARMSTART, torch.float64, "sdpa", "cpu", place, lora_rank)
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.fill_(0.01)  # zeros would hide the gradient of A
    before = {name: full(parameter).clone() for name, parameter in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    steps = []
    for step in range(2):  # the second one has changed weights
        figures = update(policy, optimizer, share, cfg, step, filler)
        steps.append([figures[name] for name in ("loss", "grad_norm", "entropy")])
    changes = {name: full(parameter) - before[name] for name, parameter in trained.items()}
    return steps, changes


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


ONES = replace(CFG, group_size=1, dynamic_sampling=False)


def ones_of(groups: list) -> list:
    """The groups' first responses, a group each."""
    return [Group(group.responses[:1], group.rewards[:1]) for group in groups]


def deal(groups: list, rank: int, ranks: int) -> list:
    """Unequal shares; with four ranks one gets nothing, and another only the question without a
    picture.
    """
    if ranks == 2:
        return groups[:7] if rank == 0 else groups[7:]
    return [groups[:5], [], groups[5:8], groups[8:]][rank]


def rank_main(rank, ranks, port, groups, questions, kb_folder, data_folder, folder):
    """What each process does; the first one writes what came out."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
    share, filler = deal(groups, rank, ranks), groups[0].responses[0]
    result = {"steps": two_steps(share, filler)}
    if ranks == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # as two nodes of two
        result["hybrid"] = two_steps(share, filler)
    if ranks == 2:
        result["lora"] = two_steps(share, filler, lora_rank=2)
        result["ones"] = two_steps(ones_of(share), filler, cfg=ONES)
        result["lockstep"] = sampled_on_two_ranks(rank, questions, kb_folder, gather=False)
        result["generate"] = sampled_on_two_ranks(rank, questions, kb_folder, sampler="generate")
        result["failure"] = failure_in_lockstep(rank)
        evaluate_five(kb_folder, data_folder, folder / "evaluated")
    if rank == 0:
        torch.save(result, folder / f"{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


def greedy(policy, kb, questions, any_left=alone, sampler="shared") -> list[list[int]]:
    cfg = replace(CFG, group_size=1, temperature=0.0, sampler=sampler)
    responses = sample(policy, kb, questions, cfg, any_left=any_left)
    return [response.token_ids.tolist() for response in responses]


def sampled_on_two_ranks(rank, questions, kb_folder, gather=True, sampler="shared") -> list:
    """Rank 0 has the last question, without a picture, rank 1 all the others.

    Weights are sharded. gather=False: no rank ever holds all of them, and both run in lockstep.
    """
    policy = load_policy(WARMSTART, torch.float32, "sdpa", "cpu", shard_in(torch.float32))
    policy.model.eval()
    kb = KnowledgeBase.open(kb_folder)
    any_left = distributed.make_any_left(policy, gather)
    mine = questions[-1:] if rank == 0 else questions[:-1]
    with distributed.gathered(policy.model, gather):
        written = greedy(policy, kb, mine, any_left, sampler)
    parts = [None, None]
    dist.all_gather_object(parts, written)
    return parts[1] + parts[0]


def failure_in_lockstep(rank: int) -> list[str]:
    """What each rank raises when the knowledge base fails on rank 0, and that they can go on."""
    policy = load_policy(WARMSTART, torch.float32, "sdpa", "cpu", shard_in(torch.float32))
    any_left = distributed.make_any_left(policy, whole=False)
    raised = ""
    try:
        with distributed.all_or_none(any_left, policy.device, KnowledgeBaseError):
            if rank == 0:
                raise KnowledgeBaseError("gone")
            while any_left(True):
                pass
    except (KnowledgeBaseError, distributed.AnotherRankFailed) as error:
        raised = type(error).__name__
    return distributed.all_objects([raised])


def evaluate_five(kb_folder, data_folder, out):
    """Five test questions in three batches: two ranks have unequally many."""
    five = {"limit": 5, "batch": 4, "samples": 2, "temperature": 1.0, "traces": 0}
    evaluate.main(evaluate.Args(WARMSTART, kb=kb_folder, data=data_folder, out=out, **five))


@pytest.fixture(scope="module")
def asked(mixed, text_only):
    return [*mixed[:5], text_only]


@pytest.fixture(scope="module")
def spawned(groups, asked, kb_folder, data_folder, tmp_path_factory):
    """{number of ranks: what they computed}, and the folder where two of them evaluated"""
    folder = tmp_path_factory.mktemp("ranks")
    results = {}
    start_forkserver(__name__)
    for ranks in (2, 4):
        arguments = (ranks, free_port(), groups, asked, kb_folder, data_folder, folder)
        mp.start_processes(rank_main, arguments, nprocs=ranks, start_method="forkserver")
        results[ranks] = torch.load(folder / f"{ranks}.pt", weights_only=True)
    return results | {"evaluated": folder / "evaluated"}


def assert_same(one: tuple, many: tuple, rounding: float = 1e-5):
    """Two results of `two_steps`. rounding: relative to the greatest change of any weight."""
    (steps, changes), (other_steps, other_changes) = one, many
    for mine, theirs in zip(steps, other_steps):
        assert mine == pytest.approx(theirs, rel=1e-5)
    size = max(change.abs().max() for change in changes.values())
    assert size > 0
    assert changes.keys() == other_changes.keys()
    for name, change in changes.items():
        assert (change - other_changes[name]).abs().max() <= rounding * size, name


def test_two_four_and_hybrid_ranks_make_the_steps_of_one(spawned, groups):
    """The same losses, gradient norms and weights, with idle ranks, unequal lengths and a question
    without a picture.
    """
    one = two_steps(groups, groups[0].responses[0])
    assert_same(one, spawned[2]["steps"])
    assert_same(one, spawned[4]["steps"])
    assert_same(one, spawned[4]["hybrid"])


def test_two_ranks_evaluate_as_one_does(spawned, kb_folder, data_folder, tmp_path):
    """Each asks its share of the batches; together they write what one writes, and no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each rank
    evaluate_five(kb_folder, data_folder, tmp_path)
    torch.set_num_threads(threads)
    for name in ("predictions.jsonl", "results.json"):
        assert (spawned["evaluated"] / name).read_text() == (tmp_path / name).read_text(), name
    files = {path.name for path in spawned["evaluated"].iterdir()}
    assert files == {"predictions.jsonl", "results.json", "report.html", ".lock"}


def test_what_fails_on_one_rank_in_lockstep_ends_all(spawned):
    assert spawned[2]["failure"] == ["KnowledgeBaseError", "AnotherRankFailed"]


def test_replicated_adapters_make_the_steps_of_one(spawned, groups):
    one = two_steps(groups, groups[0].responses[0], lora_rank=2)
    assert_same(one, spawned[2]["lora"], rounding=1e-4)  # adapters are float32


def test_groups_of_one_on_two_ranks_are_one_group(spawned, groups):
    """Rank 1 has fewer of them, and its baseline is that of all."""
    one = two_steps(ones_of(groups), groups[0].responses[0], cfg=ONES)
    assert_same(one, spawned[2]["ones"])


def test_groups_of_one_make_the_step_of_a_group(groups):
    """Four groups of one response and one group of those four: the same loss and gradient."""
    responses, rewards = groups[0]
    ones = [Group(responses[i : i + 1], rewards[i : i + 1]) for i in range(4)]
    together, apart = (
        two_steps(share, responses[0], cfg=cfg) for share, cfg in ((groups[:1], CFG), (ones, ONES))
    )
    assert_same(together, apart)


def test_groups_of_one_cannot_be_filtered():
    cfg = replace(PRESETS["tiny"], group_size=1, out=Path("runs/never"))
    with pytest.raises(ValueError, match="--group-size 1 needs --no-dynamic-sampling"):
        check_config(cfg, ranks=1)
    check_config(replace(cfg, dynamic_sampling=False), ranks=1)
    with pytest.raises(ValueError, match="at least two responses"):
        check_config(replace(cfg, dynamic_sampling=False, questions_per_step=1), ranks=1)


@pytest.mark.parametrize("how", ["lockstep", "generate"])
def test_sampling_on_ranks_is_sampling(spawned, asked, policy, kb, how):
    """Both in lockstep, and by `generate`, for which each rank has whole weights."""
    assert spawned[2][how] == greedy(policy, kb, asked)


# -------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("share_prompt", [True, False])
def test_micro_batches_keep_their_budget(responses, share_prompt):
    pairs = [(response, 0.0) for response in responses]
    batches = micro_batches(pairs, 1500, share_prompt=share_prompt)
    order = [id(response) for batch in batches for response, _ in batch]
    assert order == [id(response) for response in responses]
    assert len(batches) < len(responses)
    for batch in batches:
        packed = pack([response for response, _ in batch], "cpu", share_prompt)
        assert packed.inputs["input_ids"].numel() <= 1500


def test_a_response_beyond_the_budget_stands_alone(responses):
    batches = micro_batches([(response, 0.0) for response in responses], 1)
    assert [len(batch) for batch in batches] == [1] * len(responses)


def test_a_shared_prompt_changes_nothing(responses):
    """Loss and gradients with each prompt computed once per group, and once per response."""
    weights = torch.linspace(-1, 1, len(responses), dtype=torch.float64)

    def loss_and_gradients(share_prompt: bool) -> tuple:
        policy = load_policy(WARMSTART, torch.float64)
        logprobs, _ = policy.logprobs(responses, share_prompt=share_prompt)
        loss = (logprobs.sum(1) * weights).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in policy.model.named_parameters()}
        return loss.detach(), {name: g for name, g in gradients.items() if g is not None}

    loss, gradients = loss_and_gradients(True)
    same_loss, same_gradients = loss_and_gradients(False)
    torch.testing.assert_close(loss, same_loss, rtol=1e-6, atol=0)
    assert len(gradients) > 60
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, same_gradients[name], rtol=1e-4, atol=1e-6)


class LargestScores(TorchDispatchMode):
    """The most elements of any tensor whose last dimension is the vocabulary, the projection's own
    weight aside.
    """

    def __init__(self, weight):
        super().__init__()
        self.vocabulary, self.hidden = weight.shape
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and self.holds_scores(tensor.shape):
                self.elements = max(self.elements, tensor.numel())
        return out

    def holds_scores(self, shape) -> bool:
        return len(shape) > 1 and shape[-1] == self.vocabulary and shape[0] != self.hidden


def test_no_tensor_of_vocabulary_scores_exceeds_its_bound(policy, responses, monkeypatch):
    """Forward and backward; and cut into pieces, loss and gradients are what they are in one
    piece.
    """

    def scored(bound: int) -> tuple:
        """(most scores alive at once, what was computed)"""
        monkeypatch.setattr(model_module, "LOGITS", bound)
        trained = load_policy(WARMSTART, torch.float64)
        weight = trained.model.lm_head.weight
        with LargestScores(weight) as largest:
            logprobs, entropies = trained.logprobs(responses)
            (logprobs.sum() + 0 * entropies.sum()).backward()
        return largest.elements, (logprobs.detach(), entropies.detach(), weight.grad)

    elements, in_pieces = scored(2**18)
    assert 0 < elements <= 2**18
    elements, whole = scored(2**40)
    tokens = sum(int(response.policy_mask.sum()) for response in responses)
    assert elements == tokens * len(policy.bias)
    assert elements > 2**20, "without pieces it would be much"
    for mine, theirs in zip(in_pieces, whole):
        torch.testing.assert_close(mine, theirs)


# ------------------------------------------------------------------------- numbers that are none


def test_a_non_finite_step_is_skipped_counted_and_kept(groups, tmp_path):
    policy = load_policy(WARMSTART, torch.float32)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-4)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    cfg = replace(CFG, out=tmp_path)
    broken = [Group(group.responses, group.rewards * torch.nan) for group in groups[:2]]
    figures = update(policy, optimizer, broken, cfg, step=6)
    assert figures["updates_skipped"] == 1
    assert not optimizer.state
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(before[name], parameter), name

    kept = load_file(tmp_path / "bad-step-000007-0-rank0.safetensors")
    assert torch.equal(kept["3.token_ids"], broken[0].responses[3].token_ids)
    assert kept["advantages"].isnan().all()

    figures = update(policy, optimizer, groups[:2], cfg, step=7)  # and it goes on
    assert figures["updates_skipped"] == 0
    assert figures["grad_norm"] > 0


def test_gradients_are_clipped(groups):
    policy = load_policy(WARMSTART, torch.float32)
    logprobs, _ = policy.logprobs(groups[0].responses)
    logprobs.sum().backward()
    assert clip_gradients(policy.model, 0.5) > 0.5
    assert clip_gradients(policy.model, 10.0) == pytest.approx(0.5, rel=1e-4)


def test_recomputed_logprobs_are_weighted_by_a_truncated_ratio(groups):
    """What the rollout said is changed on purpose: the recomputed log-probs replace it, and their
    ratio is capped.
    """
    originals, rewards = groups[0]
    changes = [0.1 if i % 2 else -3.0 for i in range(len(originals))]
    responses = []
    for original, change in zip(originals, changes):
        changed = original.logprobs + torch.where(original.policy_mask, change, 0.0)
        responses.append(replace(original, logprobs=changed))
    policy = load_policy(WARMSTART, torch.float32)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    cfg = replace(CFG, recompute_logprobs=True, max_rollout_ratio=2.0)
    figures = update(policy, optimizer, [Group(responses, rewards)], cfg)
    assert figures["logprob_diff_max"] == pytest.approx(3.0, abs=1e-3)
    assert figures["clip_fraction"] == 0
    for response, original, change in zip(responses, originals, changes):
        torch.testing.assert_close(response.logprobs, original.logprobs, rtol=0, atol=1e-3)
        ratio = 0.9048 if change == 0.1 else 2.0  # exp(-0.1); exp(3), capped
        own = response.weights[response.policy_mask]
        torch.testing.assert_close(own, torch.full_like(own, ratio), rtol=0, atol=1e-3)
        assert (response.weights[~response.policy_mask] == 1).all()


# ---------------------------------------------------------------------------------------- runs

SMALL = {
    "questions_per_step": 4,
    "group_size": 4,
    "eval_questions": 4,
    "eval_every": 2,
    "save_every": 2,
    "max_refills": 1,
    "steps": 4,
}
TIMED = {
    "seconds_rollout",
    "seconds_search",
    "seconds_train",
    "tokens_per_second",
    "eval_seconds",
}


def train_here(kb_folder, data_folder, out, **options):
    """A run in this process; only `whole` draws its pictures, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        if out.name != "tiny":
            patch.setattr(train_module, "plot_curves", lambda *_: None)
        run_here(kb_folder, data_folder, out, **options)


def run_here(kb_folder, data_folder, out, **options):
    cfg = replace(PRESETS["tiny"], kb=kb_folder, data=data_folder, out=out, **SMALL | options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process that is killed
    try:
        train_module.train(cfg)
    finally:
        torch.set_num_threads(threads)


def figures_of(out) -> list[dict]:
    """The run's log, without what a clock said."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMED} for record in records]


@pytest.fixture(scope="module")
def whole(kb_folder, data_folder, tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "runs" / "tiny"
    train_here(kb_folder, data_folder, out, tensorboard=True)
    return out


def test_a_run_logs_its_steps_and_its_evaluations(whole):
    records = figures_of(whole)
    steps = [record for record in records if "reward_mean" in record]
    evaluations = [record for record in records if "eval_n" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(record["logprob_diff_max"] < 1e-3 for record in steps)
    assert [record["step"] for record in evaluations] == [0, 2, 4]
    names = {"sampled_overall", "greedy_overall", "greedy_compare", "format_rate"}
    assert {f"eval_{name}" for name in names} <= evaluations[0].keys()
    assert (whole / "curves.png").stat().st_size > 10_000
    assert (whole / "diagnostics.png").stat().st_size > 10_000
    assert list((whole / "tensorboard").glob("events.*"))


def test_a_run_logs_once_what_its_curves_are_measured_against(whole):
    (found,) = [record for record in figures_of(whole) if "ceiling" in record]
    assert found["step"] == 0
    assert 50 < found["ceiling"] <= 100


def test_steps_and_evaluations_say_how_often_an_answer_is_early_and_a_search_wasted(whole):
    for record in figures_of(whole):
        if "reward_mean" in record:
            assert 0 <= record["early_rate"] <= 1
            assert 0 <= record["wasted_calls_mean"] <= record["tool_calls_mean"]
        if "eval_n" in record:
            for way in ("sampled", "greedy"):
                assert 0 <= record[f"eval_{way}_early_rate"] <= 1
                assert 0 <= record[f"eval_{way}_wasted_calls"] <= record[f"eval_{way}_tool_calls"]


def test_the_honest_teachers_accuracy_is_that_of_the_recipe_that_training_starts_from(
    kb, questions, cfg, tmp_path
):
    cfg = replace(cfg, init=str(tmp_path))
    assert "honest" not in landmarks(kb, questions[:4], cfg, "cpu")
    honest = {"greedy": 87.5, "sampled": 85.0}
    (tmp_path / "recipe.json").write_text(json.dumps({"honest": honest}))
    assert landmarks(kb, questions[:4], cfg, "cpu")["honest"] == honest
    without = [replace(question, hops=None) for question in questions[:4]]
    assert "ceiling" not in landmarks(kb, without, cfg, "cpu")
    two_hops = [replace(question, split="Bridge", num_steps=2) for question in questions[:4]]
    assert "ceiling" not in landmarks(kb, two_hops, cfg, "cpu")  # none counts as Overall


def test_text_search_alone_can_be_trained(kb_folder, data_folder, tmp_path):
    """Captions stand in for pictures, and there is nothing to look up by them."""
    captions = tmp_path / "captions.jsonl"
    names = [question.id for question in load_questions(data_folder, "train")]
    captions.write_text("".join(f'{{"id": "{name}", "caption": "a flag"}}\n' for name in names))
    train_here(
        kb_folder,
        data_folder,
        tmp_path / "run",
        mode="text-only",
        captions=captions,
        steps=1,
        dynamic_sampling=False,
    )
    (step,) = [r for r in figures_of(tmp_path / "run") if "reward_mean" in r]
    assert step["image_calls_mean"] == 0 and step["groups_kept"] == 4
    recipe = json.loads((tmp_path / "run" / "latest" / "recipe.json").read_text())
    assert recipe["mode"] == "text-only"


def test_a_surplus_of_groups_is_kept_or_dropped(policy, kb, mixed, monkeypatch):
    """Four groups are sampled at a time, and two of the second four were too many."""
    kept = iter([2, 4] * 2)

    def informative(responses, rewards, cfg):
        size = cfg.group_size
        some = [responses[i : i + size] for i in range(0, len(responses), size)][: next(kept)]
        return [Group(group, torch.zeros(size)) for group in some]

    monkeypatch.setattr(train_module, "informative", informative)
    cfg = replace(CFG, questions_per_step=4, max_refills=1, max_turns=0, group_size=2)
    for keep, left in ((True, 2), (False, 0)):
        run = train_module.Run()
        stream = iter(mixed[:4] * 4)
        groups, *_ = train_module.collect(
            policy, kb, stream, replace(cfg, keep_surplus=keep), run, alone
        )
        assert (len(groups), len(run.surplus)) == (4, left)


def test_a_rank_that_waits_for_a_slower_one_keeps_a_share_of_groups_at_most(
    policy, kb, mixed, monkeypatch
):
    """The newest ones: the others' policy is steps away."""
    made = []

    def informative(responses, rewards, cfg):
        size = cfg.group_size
        some = [responses[i : i + size] for i in range(0, len(responses), size)]
        made.extend(Group(group, torch.zeros(size)) for group in some)
        return made[-len(some) :]

    monkeypatch.setattr(train_module, "informative", informative)
    monkeypatch.setattr(train_module, "reduced", lambda *_: 0)  # another rank has none
    cfg = replace(CFG, questions_per_step=2, max_refills=1, max_turns=0, group_size=2)
    run, stream = train_module.Run(), iter(mixed)
    for step in (1, 2):
        train_module.collect(policy, kb, stream, cfg, run, alone)
        assert len(made) == 4 * step
        assert list(map(id, run.surplus)) == list(map(id, made[-2:]))


def test_a_run_may_sample_with_generate(kb_folder, data_folder, tmp_path):
    train_here(kb_folder, data_folder, tmp_path, sampler="generate", steps=1)
    step, evaluation = figures_of(tmp_path)[-2:]
    assert step["logprob_diff_max"] < 1e-3
    assert step["response_tokens_mean"] > 0
    assert evaluation["eval_n"] == SMALL["eval_questions"]
    with pytest.raises(ValueError, match="--no-gather-weights"):
        check_config(replace(PRESETS["tiny"], sampler="generate", gather_weights=False), ranks=1)


def test_sigterm_saves_and_the_resumed_run_is_the_same(whole, kb_folder, data_folder, tmp_path):
    out = tmp_path / "cut"
    metrics = out / "metrics.jsonl"
    flags = ["--kb", kb_folder, "--data", data_folder, "--out", out]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    process = subprocess.Popen(
        [sys.executable, "train.py", "tiny", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    # 1) After its first step it is asked to stop.
    while not metrics.exists() or '"reward_mean"' not in metrics.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    assert "stopped by a signal" in output
    # 2) No finished step is lost.
    saved = json.loads((out / "latest" / "trainer.json").read_text())["step"]
    assert 1 <= saved < 4
    assert max(record["step"] for record in figures_of(out)) == saved
    # 3) It goes on as if nothing had happened.
    train_here(kb_folder, data_folder, out, resume=True)
    assert figures_of(out) == figures_of(whole)


def test_a_damaged_checkpoint_is_refused(whole, tmp_path):
    assert sorted(p.name for p in whole.glob("step-*")) == ["step-000002", "step-000004"]
    assert checkpoint.verify(whole / "latest")["step"] == 4

    def damage(name: str, change):
        """A copy of the checkpoint, one file of which is not what was written."""
        copy = tmp_path / name
        shutil.copytree(whole / "latest", copy)
        content = bytearray((copy / name).read_bytes())
        change(content)
        (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not what was written"):
            checkpoint.verify(copy)

    def flip_a_bit(content: bytearray):
        content[-5] ^= 1

    damage("optimizer-0.safetensors", flip_a_bit)
    damage("model.safetensors", flip_a_bit)
    damage("surplus-0.safetensors", bytearray.pop)


def test_what_a_kill_left_of_another_step_is_removed(policy, tmp_path):
    (tmp_path / ".step-000007.writing").mkdir()
    cfg = replace(PRESETS["tiny"], out=tmp_path)
    optimizer = torch.optim.AdamW(policy.model.parameters())
    checkpoint.save(policy, optimizer, cfg, {"step": 9}, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000009"]


def test_groups_of_questions_that_other_data_lack_do_not_wait_on(groups, tmp_path):
    policy = load_policy(WARMSTART, torch.float32)
    cfg = replace(PRESETS["tiny"], out=tmp_path)
    checkpoint.save(policy, torch.optim.AdamW(policy.model.parameters()), cfg, {"step": 1}, groups)
    asked = [group.responses[0].question for group in groups[:2]]
    _, _, run = train_module.start_run(replace(cfg, resume=True), "cpu", asked)
    assert run.step == 1
    assert [group.responses[0].question for group in run.surplus] == asked
    assert torch.equal(run.surplus[1].rewards, groups[1].rewards)


def test_half_a_checkpoint_is_refused(whole, tmp_path):
    shutil.copytree(whole / "latest", tmp_path / "half")
    (tmp_path / "half" / "trainer.json").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint.verify(tmp_path / "half")


def test_adapters_are_trained_saved_resumed_and_merged(kb_folder, data_folder, tmp_path):
    options = {"lora_rank": 4, "freeze_vision": True, "lr": 1e-3, "steps": 3}
    run, cut, merged = tmp_path / "whole", tmp_path / "cut", tmp_path / "merged"
    train_here(kb_folder, data_folder, run, **options)
    # 1) The run as it was after its second step, resumed.
    cut.mkdir()
    shutil.copytree(run / "step-000002", cut / "step-000002")
    (cut / "latest").symlink_to("step-000002")
    shutil.copy(run / "metrics.jsonl", cut)
    train_here(kb_folder, data_folder, cut, resume=True, **options)
    assert figures_of(cut) == figures_of(run)
    # 2) Only the adapters are saved.
    assert (run / "latest" / "adapter_model.safetensors").exists()
    assert not list((run / "latest").glob("model*.safetensors"))
    # 3) They are evaluated as they are.
    small = {"limit": 2, "samples": 1, "traces": 0, "out": tmp_path / "eval"}
    evaluate.main(evaluate.Args(run / "latest", kb=kb_folder, data=data_folder, **small))
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["ckpt"].endswith("latest")
    # 4) Merged, they compute the same.
    checkpoint.merge(checkpoint.Merge(run / "latest", merged))

    def scores(name):
        model = load_policy(name, torch.float32).model.eval()
        with torch.no_grad():
            return model(input_ids=torch.arange(40)[None] + 300).logits

    adapted = scores(run / "latest")
    learned = (adapted - scores(WARMSTART)).abs().max()
    lost = (adapted - scores(merged)).abs().max()  # merged weights are float16, as the base's are
    assert learned > 10 * lost


def test_adapters_on_a_bfloat16_model_are_loaded_as_they_were_saved(tmp_path):
    policy = load_policy(WARMSTART, torch.bfloat16, lora_rank=2)
    adapters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    for parameter in adapters.values():
        parameter.data.normal_()  # most of it no number of bfloat16
    policy.model.save_pretrained(tmp_path)
    policy.processor.save_pretrained(tmp_path)
    again = load_policy(tmp_path, torch.bfloat16, lora_rank=2).model
    assert next(again.parameters()).dtype == torch.bfloat16
    loaded = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert loaded.keys() == adapters.keys() and len(loaded) > 20
    for name, parameter in adapters.items():
        assert torch.equal(loaded[name], parameter), name


def test_a_checkpoint_is_a_model_by_the_three_lines_of_the_docs(whole, monkeypatch):
    page = (ROOT / "docs" / "commands.md").read_text()
    lines = re.search(r"```python\n(from transformers.*?)```", page, re.DOTALL).group(1)
    monkeypatch.chdir(whole.parent.parent)
    scope = {}
    exec(lines, scope)
    assert type(scope["model"]).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(scope["processor"]).__name__ == "Qwen2_5_VLProcessor"


# ------------------------------------------------------------------------------- what a run takes


def test_the_plan_of_the_paper_fits_eight_gpus_and_not_one(capsys):
    cost.show(PRESETS["paper"])
    text = capsys.readouterr().out
    for said in ("8,292,166,656 parameters", "2,048 responses", "unmeasured"):
        assert said in text
    assert re.search(r"retrieval encoders\W+2\.0", text)
    assert re.search(r"retrieval indexes\W+0\.0", text)
    cost.show(replace(PRESETS["paper"], index_device="gpu"))
    assert re.search(r"retrieval indexes\W+2\.6", capsys.readouterr().out)
    with pytest.raises(ValueError, match="cannot fit.*--offload"):
        cost.show(replace(PRESETS["paper"], plan_gpus=1))
    cost.show(replace(PRESETS["small"], plan_gpus=1, plan_gpu_gb=24))


def test_the_plans_flops_are_those_of_pytorchs_counter(responses):
    policy = load_policy(WARMSTART, torch.float32, "eager")
    response = responses[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.logprobs([response])
    config, size = policy.model.config, len(response.token_ids)
    counts = cost.parameter_counts(config)
    sampled, patches = int(response.policy_mask.sum()), len(response.prompt.pixel_values)
    expected = cost.forward_flops(config, counts, size, size, sampled, patches)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.15)
