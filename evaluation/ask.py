"""Asking a policy many questions, in batches: by evaluate.py, and while it trains."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from data import Question
from engine.distributed import all_objects, all_or_none, gathered, make_any_left, world
from engine.pictures import readable, too_long
from evaluation.summary import summarize
from retrieval import KnowledgeBaseError
from rollout import Response, sample


def answered_batches(
    ask: Callable,
    questions: list[Question],
    size: int = 128,
    seed: int = 0,
    device="cpu",
    starts: Sequence[int] | None = None,
    progress: bool = False,
) -> Iterator[list[Response]]:
    """The responses of ask(questions, generator), by batch of `size` questions.

    starts: where the batches begin that are to be asked; all, unless given. What is left out
    changes nothing for the others: each batch draws from a seed of its own.
    """
    if starts is None:
        starts = range(0, len(questions), size)
    for start in tqdm(starts, desc="evaluate", leave=False, disable=not progress):
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + start)
        yield ask(questions[start : start + size], generator)


def set_aside(processor, questions: list[Question], cfg) -> tuple[list[Question], list[bool]]:
    """(what to ask, which questions cannot be asked: something short stands in for them).

    Those have too long a prompt, or a picture that cannot be read. So a batch has as many questions
    on every rank, whatever they are.
    """
    aside = [not readable(q) or too_long(processor, q, cfg) for q in questions]
    short = {"problem": "", "images": (), "opening": ()}
    asked = [replace(q, **short) if is_aside else q for q, is_aside in zip(questions, aside)]
    return asked, aside


def put_back(
    responses: list[Response], questions: list[Question], aside: list[bool]
) -> list[Response]:
    """The responses, and to questions that were not asked some that say nothing: they are wrong."""
    group_size = len(responses) // len(questions)
    return [
        Response(questions[i // group_size], None, None, None, None, stop="prompt")
        if aside[i // group_size]
        else response
        for i, response in enumerate(responses)
    ]


def ask_all(
    ask: Callable, questions: list[Question], size: int = 128, seed: int = 0, device="cpu"
) -> list[Response]:
    """The responses of ask(questions, generator), in the questions' order."""
    return [
        response for new in answered_batches(ask, questions, size, seed, device) for response in new
    ]


def share_of(questions: list[Question]) -> list[Question]:
    """This rank's part of the questions: the parts of all ranks, one after another, are all."""
    rank, ranks = world()
    share = -(-len(questions) // ranks)
    return questions[rank * share : (rank + 1) * share]


def evaluate_both_ways(policy, kb, questions: list[Question], cfg) -> dict:
    """Sampled (temperature 1) and greedy accuracies, as `eval_…`; the same result on all ranks."""
    started = time.monotonic()
    # 1) each rank asks a share of the questions, filled up: equally many batches on every rank
    mine = share_of(questions)
    filled = (mine + questions)[: -(-len(questions) // world()[1])]

    # 2) ask them twice in one batch, greedily first, and count over all ranks
    out = {"eval_n": len(questions)}
    policy.model.eval()
    with gathered(policy.model, cfg.gather_weights):
        # with these weights: a server may have older ones
        own = "shared" if cfg.sampler == "endpoint" else cfg.sampler
        twice = replace(cfg, group_size=2, temperature=1.0, sampler=own)
        responses = ask_together(policy, kb, filled, twice, num_greedy=1)[: 2 * len(mine)]
    light = all_objects([replace(response, prompt=None) for response in responses])
    for way, some in (("sampled", light[1::2]), ("greedy", light[::2])):
        result = summarize(some)
        for row in ("overall", "bridge", "compare", "bridge_2", "bridge_3", "bridge_4"):
            out[f"eval_{way}_{row}"] = result[row]
        out[f"eval_{way}_format_rate"] = result["format_rate"]
        out[f"eval_{way}_tool_calls"] = result["tool_calls_mean"]
        out[f"eval_{way}_image_calls"] = result["image_calls_mean"]
        out[f"eval_{way}_early_rate"] = result["early_rate"]
        out[f"eval_{way}_wasted_calls"] = result["wasted_calls_mean"]
        out[f"eval_{way}_failures"] = result["failures"]
    out["eval_format_rate"] = out["eval_sampled_format_rate"]
    out["eval_seconds"] = round(time.monotonic() - started, 1)
    return out


def ask_together(policy, kb, questions: list[Question], cfg, num_greedy: int) -> list[Response]:
    """This rank's responses, the first `num_greedy` of each question's greedy ones.

    What goes wrong on one rank is raised on all, so that none waits.
    """
    any_left = make_any_left(policy, cfg.gather_weights)

    def ask(questions, generator):
        asked, aside = set_aside(policy.processor, questions, cfg)
        responses = sample(policy, kb, asked, cfg, generator, any_left, num_greedy)
        return put_back(responses, questions, aside)

    with all_or_none(any_left, policy.device, KnowledgeBaseError):
        seed = cfg.seed + world()[0]
        at_once = max(1, cfg.rollout_rows // cfg.group_size)
        responses = ask_all(ask, questions, at_once, seed, policy.device)
    return responses
