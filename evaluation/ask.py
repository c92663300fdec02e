"""Asking a policy many questions, in batches: by evaluate.py, and while it trains."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from tqdm import tqdm

from data import Question
from engine.distributed import all_objects, all_or_none, gathered, make_any_left, world
from evaluation.summary import summarize
from retrieval import KnowledgeBaseError
from rollout import Response, sample


def batches(
    ask: Callable,
    questions: list[Question],
    size: int = 128,
    seed: int = 0,
    device="cpu",
    progress: bool = False,
    done: int = 0,
) -> Iterator[list[Response]]:
    """The responses of ask(questions, generator), by batch of `size` questions.

    The first `done` questions, a multiple of `size`, are left out. That changes nothing for the
    others: each batch draws from a seed of its own.
    """
    starts = tqdm(
        range(done, len(questions), size),
        desc="evaluate",
        initial=done // size,
        total=-(-len(questions) // size),
        leave=False,
        disable=not progress,
    )
    for start in starts:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + start)
        yield ask(questions[start : start + size], generator)


def ask_all(
    ask: Callable, questions: list[Question], size: int = 128, seed: int = 0, device="cpu"
) -> list[Response]:
    """The responses of ask(questions, generator), in the questions' order."""
    return [response for new in batches(ask, questions, size, seed, device) for response in new]


def evaluate_both_ways(policy, kb, questions: list[Question], cfg) -> dict:
    """Sampled (temperature 1) and greedy accuracies, as `eval_…`; the same result on all ranks."""
    started = time.time()
    # 1) each rank asks a share of the questions, filled up: equally many batches on every rank
    rank, ranks = world()
    share = -(-len(questions) // ranks)
    mine = questions[rank * share : (rank + 1) * share]
    filled = (mine + questions)[:share]

    # 2) ask them in both ways, and count over all ranks
    out = {"eval_n": len(questions)}
    policy.model.eval()
    with gathered(policy.model, cfg.gather_weights):
        for way, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            once = replace(cfg, group_size=1, temperature=temperature)
            responses = ask_together(policy, kb, filled, once)[: len(mine)]
            light = [replace(response, prompt=None) for response in responses]
            result = summarize(all_objects(light))
            for row in ("overall", "bridge", "compare", "bridge_2", "bridge_3", "bridge_4"):
                out[f"eval_{way}_{row}"] = result[row]
            out[f"eval_{way}_format_rate"] = result["format_rate"]
            out[f"eval_{way}_tool_calls"] = result["tool_calls_mean"]
            out[f"eval_{way}_early_rate"] = result["early_rate"]
            out[f"eval_{way}_wasted_calls"] = result["wasted_calls_mean"]
            out[f"eval_{way}_failures"] = result["failures"]
    out["eval_format_rate"] = out["eval_sampled_format_rate"]
    out["eval_seconds"] = round(time.time() - started, 1)
    return out


def ask_together(policy, kb, questions: list[Question], cfg) -> list[Response]:
    """This rank's responses. What goes wrong on one rank is raised on all, so that none waits."""
    any_left = make_any_left(policy, cfg.gather_weights)

    def ask(questions, generator):
        return sample(policy, kb, questions, cfg, generator, any_left)

    with all_or_none(any_left, policy.device, KnowledgeBaseError):
        seed = cfg.seed + world()[0]
        responses = ask_all(ask, questions, cfg.rollout_rows, seed, policy.device)
    return responses
