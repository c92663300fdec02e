"""What a training step leaves behind: a record in metrics.jsonl and a line on the terminal."""

from functools import cache

from engine import cost
from engine.distributed import reduced, world
from evaluation.summary import searches


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

    def mean(values) -> float:
        return reduced(sum(values), device) / count

    names = {"total": "reward_mean", "format": "format_rate"}
    record = {"step": run.step}
    for term in rewards[0]:
        record[names.get(term, f"{term}_mean")] = mean(terms[term] for terms in rewards)
    record |= {
        "tool_calls_mean": mean(len(searches(response)) for response in sampled),
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
