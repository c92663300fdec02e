"""What a training step leaves behind: a record in metrics.jsonl and a line on the terminal."""

from distributed import reduced, world
from engine import cost
from evaluation.summary import searches


def step_record(policy, cfg, run, groups, sampled, rewards, figures, seconds) -> dict:
    """What metrics.jsonl holds of a step: the same on all ranks, but for the seconds."""
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
        **{f"seconds_{part}": round(value, 3) for part, value in seconds.items()},
    }
    step_seconds = seconds["rollout"] + seconds["train"]
    record["tokens_per_second"] = round(reduced(sum(tokens), device) / step_seconds, 1)
    peak = cost.peak_flops(cfg)
    if peak:
        config = policy.model.config
        trained = [response for group in groups for response in group.responses]
        flops = cost.update_flops(cfg, config, cost.parameter_counts(config), trained)
        used = reduced(flops, device) / (seconds["train"] * ranks)
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
