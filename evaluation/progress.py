"""What a run writes: records of its start and its steps to metrics.jsonl, lines to the terminal."""

from functools import cache

import numpy as np

from engine import cost
from engine.distributed import all_objects, all_or_none, alone, reduced, world
from engine.weights import read_recipe
from evaluation.ask import share_of
from evaluation.summary import calls, ceiling, early, percent, rows_of, searches, wasted
from retrieval import KnowledgeBaseError


def landmarks(kb, questions, cfg, device) -> dict:
    """What the curves of a run are measured against: a record of its start, the same on all ranks.

    `ceiling`: accuracy of a perfect policy with these retrievers, in percent; absent where no
    question of Overall has a gold chain, or pictures are not shown. `honest`: {"greedy", "sampled"}
    accuracy of imitating an honest teacher, without RL; absent where the recipe of what training
    starts from does not say.
    """
    record = {"step": 0}
    overall = rows_of(questions)["overall"]
    if cfg.mode == "agent" and any(questions[i].hops for i in overall.nonzero()[0]):
        with all_or_none(alone, device, KnowledgeBaseError):
            # each rank has just asked its share, and knows its pictures
            possible = ceiling(kb, share_of(questions), cfg).tolist()
        possible = np.array(all_objects(possible))
        record["ceiling"] = percent(possible[overall])
    honest = read_recipe(cfg.init).get("honest")
    if honest:
        record["honest"] = honest
    return record


def start_line(policy, kb, questions, run) -> str:
    parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    return (
        f"{parameters:,} parameters on {world()[1]} × {policy.device}; {len(questions)} questions, "
        f"{kb.sizes[0]} passages, {kb.sizes[1]} images; "
        f"{'resuming' if run.step else 'starting'} at step {run.step}"
    )


@cache  # of a model: counting takes seconds
def counts_of(model) -> dict[str, int]:
    return cost.parameter_counts(model.config)


def step_record(policy, cfg, run, groups, sampled, rewards, figures, seconds) -> dict:
    """What metrics.jsonl holds of a step: the same on all ranks, but for the seconds.

    seconds: of sampling, of them searching, and of updating.
    """
    rollout, search, training = seconds
    device, ranks = policy.device, world()[1]
    count = reduced(len(sampled), device)
    tokens = [int(response.policy_mask.sum()) for response in sampled]
    chains = [response for response in sampled if response.question.hops]
    chain_count = reduced(len(chains), device)

    def mean(values) -> float:
        return reduced(sum(values), device) / count

    def mean_of_chains(values) -> float | None:
        total = reduced(sum(values), device)
        return total / chain_count if chain_count else None

    names = {"total": "reward_mean", "format": "format_rate"}
    record = {"step": run.step}
    for term in rewards[0]:
        record[names.get(term, f"{term}_mean")] = mean(terms[term] for terms in rewards)
    record |= {
        "tool_calls_mean": mean(len(searches(response)) for response in sampled),
        "image_calls_mean": mean(calls(response, "image_search") for response in sampled),
        "early_rate": mean_of_chains(early(response) for response in chains),
        "wasted_calls_mean": mean_of_chains(wasted(response) for response in chains),
        "groups_kept": int(reduced(len(groups), device)),
        "surplus": int(reduced(len(run.surplus), device)),
        "response_tokens_mean": mean(tokens),
        **figures,
        "seconds_rollout": round(rollout, 3),
        "seconds_search": round(search, 3),
        "seconds_train": round(training, 3),
    }
    record["tokens_per_second"] = round(reduced(sum(tokens), device) / (rollout + training), 1)
    peak = cost.peak_flops(cfg)
    if peak:
        config = policy.model.config
        trained = [response for group in groups for response in group.responses]
        flops = cost.update_flops(cfg, config, counts_of(policy.model), trained)
        used = reduced(flops, device) / (training * ranks)
        record["mfu"] = round(used / peak, 4)
    return record


def step_line(record: dict, cfg, run, seconds: float) -> str:
    return (
        f"step {run.step:4d}/{cfg.steps}  reward {record['reward_mean']:.3f}  "
        f"accuracy {record['outcome_mean']:.3f}  format {record['format_rate']:.3f}  "
        f"tools {record['tool_calls_mean']:.2f}  kept {record['groups_kept']:2d}  "
        f"entropy {record['entropy']:.3f}  {seconds:.1f} s  (total {run.seconds / 60:.1f} min)"
    )


def evaluation_line(run, result: dict) -> str:
    return (
        f"  step {run.step}: held-out accuracy {result['eval_sampled_overall']}% sampled, "
        f"{result['eval_greedy_overall']}% greedy (Bridge {result['eval_greedy_bridge']}, "
        f"Compare {result['eval_greedy_compare']}), format {result['eval_format_rate']:.2f}, "
        f"{result['eval_seconds']:.0f} s"
    )


def end_line(run, cfg) -> str:
    """Why the run ends, where steps are left; and what it wrote."""
    reason = ""
    if run.step < cfg.steps:
        reason = (
            f"stopped after {run.step} of {cfg.steps} steps: sampling and updating took "
            f"{run.seconds / 60:.1f} minutes (--max-minutes {cfg.max_minutes:g})\n"
        )
    out = cfg.out
    return reason + f"wrote {out / 'latest'}, {out / 'metrics.jsonl'} and {out / 'curves.png'}"
