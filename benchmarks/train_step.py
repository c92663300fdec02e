"""A whole training step side by side: ours, and TRL's GRPOTrainer.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train_step.py                         # the paper's lengths, a small policy
    python benchmarks/train_step.py --questions 2 --repeats 1 --json

A step: sample G responses per question over several turns with observations, reward them, take one
optimizer step with the token-level clipped loss, observations masked out. Both have the same
policy, questions, numbers of tokens and (random) rewards; rollout.py beside this file has the
lengths. The two take turns (A B A B …).
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image
from transformers import TrainerCallback

from benchmarks.rollout import Args as RolloutArgs
from benchmarks.rollout import (
    make,
    observation,
    observation_lengths,
    rollout_config,
    sample_forced,
    tokens_to_sample,
    with_preset,
)
from config import Config
from model import Policy
from train import Group, update  # train.py's environment variables hold for both systems

LEARNING_RATE = 1e-6
PARTS = ("rollout", "update", "step")


@dataclass
class Args(RolloutArgs):
    """Time training steps."""

    questions: int = 4
    turns: int = 4  # turns that search, before the one that answers
    micro_rows: int = 4  # TRL's per_device_train_batch_size
    micro_tokens: int = 16_384  # ours
    repeats: int = 2


def rewards(n: int) -> list[float]:
    """Random ones, the same every time: every group teaches something."""
    return torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()


# ------------------------------------------------------------------------------------------ ours


def step_config(args: Args, folder: Path) -> Config:
    return replace(
        rollout_config(args, args.turns),
        updates_per_step=1,  # so no old log-probs are computed again; TRL does the same
        micro_tokens=args.micro_tokens,
        lr=LEARNING_RATE,
        out=folder,
    )


def our_step(
    args: Args, policy: Policy, questions: list, cfg: Config, optimizer
) -> tuple[float, float]:
    """Seconds of the rollout and of the update."""
    started = time.perf_counter()
    policy.model.eval()
    responses = sample_forced(args, policy, questions, cfg)
    middle = time.perf_counter()
    totals = torch.tensor(rewards(len(responses))).view(-1, cfg.group_size)  # (Q, G)
    groups = [
        Group(responses[i * cfg.group_size : (i + 1) * cfg.group_size], row)
        for i, row in enumerate(totals)
    ]
    update(policy, optimizer, groups, cfg, filler=responses[0])
    return middle - started, time.perf_counter() - middle


# ----------------------------------------------------------------------------------------- TRL's


class TakeTurns(TrainerCallback):
    """Before each of TRL's steps, one of ours. Keeps the seconds (rollout, update) of both."""

    def __init__(self, step_of_ours):
        """step_of_ours: () → seconds of its rollout and of its update."""
        self.step_of_ours = step_of_ours
        self.ours, self.theirs = [], []
        self.started = 0.0  # when TRL's step began
        self.rollout_seconds = 0.0  # of TRL's step; `forced_turns` writes it
        self.sampled_tokens = 0  # and this

    def on_step_begin(self, *args, **kwargs):
        self.ours.append(self.step_of_ours())
        show_step("ours:", self.ours[-1])
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        whole = time.perf_counter() - self.started
        self.theirs.append((self.rollout_seconds, whole - self.rollout_seconds))
        show_step("TRL: ", self.theirs[-1])


def show_step(name: str, seconds: tuple[float, float]):
    print(f"  {name} rollout {seconds[0]:.1f} s, update {seconds[1]:.1f} s", flush=True)


def forced_turns(args: Args, tokenizer, clock: TakeTurns):
    """TRL's hook for custom rollouts.

    TRL runs an agent's tools in a loop that hands `generate` the whole text so far, every turn. A
    policy with random weights calls no tools, so the hook forces the same turns through the
    trainer's own generation method, with exactly the inputs that loop would give it. Its faster
    samplers are not compared: vLLM needs a GPU, and continuous batching takes no pictures.
    """

    def roll(prompts, trainer) -> dict:
        started = time.perf_counter()
        prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
        prompt_kinds = [list(kinds) for kinds in fields["mm_token_type_ids"]]
        texts = [[] for _ in prompt_ids]  # what follows each prompt
        masks = [[] for _ in prompt_ids]  # 1 where the policy sampled the token
        for turn in range(args.turns + 1):
            whole = [prompt + text for prompt, text in zip(prompt_ids, texts)]
            fields["mm_token_type_ids"] = [
                kinds + [0] * len(text) for kinds, text in zip(prompt_kinds, texts)
            ]
            written, _ = trainer._generate_single_turn(whole, images, fields, args.group_size)
            for number, ids in enumerate(written):
                texts[number] += ids
                masks[number] += [1] * len(ids)
                if turn < args.turns:
                    found = observation(args, tokenizer, number, turn + 1)
                    texts[number] += found
                    masks[number] += [0] * len(found)
        clock.rollout_seconds = time.perf_counter() - started
        clock.sampled_tokens = sum(map(sum, masks))
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": texts,
            "logprobs": None,
            "env_mask": masks,
        }

    return roll


def trl_trainer(args: Args, folder: Path, policy: Policy, questions: list, clock: TakeTurns):
    """GRPOTrainer with the policy's weights: loss "dapo", no KL, one optimizer step per rollout."""
    from datasets import Dataset
    from transformers import Qwen2_5_VLForConditionalGeneration
    from trl import GRPOConfig, GRPOTrainer

    cuda = args.device.startswith("cuda")
    sampled = (args.turns + 1) * args.turn_tokens
    _, longest = observation_lengths(args)
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=args.repeats,
        per_device_train_batch_size=args.micro_rows,
        gradient_accumulation_steps=args.questions * args.group_size // args.micro_rows,
        num_generations=args.group_size,
        max_completion_length=sampled + args.turns * longest,
        beta=0.0,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        temperature=1.0,
        top_k=0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=cuda and args.dtype == "bfloat16",
        use_cpu=not cuda,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        dataloader_pin_memory=cuda,
    )
    rows = []
    for question in questions * args.repeats:
        text = question.problem.replace("<image>", "")
        message = {"role": "user", "content": text}
        rows.append({"prompt": [message], "images": [str(question.images[0])]})
    data = Dataset.from_list(rows)
    data.set_transform(open_pictures)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    )
    trainer = GRPOTrainer(
        model=model.to(args.device),
        reward_funcs=[lambda prompts, **_: rewards(len(prompts))],
        args=config,
        train_dataset=data,
        processing_class=policy.processor,
        rollout_func=forced_turns(args, policy.tokenizer, clock),
        callbacks=[clock],
    )
    generation = trainer.generation_config
    generation.min_new_tokens = generation.max_new_tokens = args.turn_tokens
    generation.suppress_tokens = policy.bias.isinf().nonzero()[:, 0].tolist()
    return trainer


def open_pictures(batch: dict) -> dict:
    return batch | {"images": [[Image.open(path) for path in paths] for paths in batch["images"]]}


# ------------------------------------------------------------------------------------ the result


def medians(times: list[tuple[float, float]]) -> dict[str, float]:
    """{part: seconds} of a system's steps, each given as its (rollout, update)."""
    columns = ([r for r, _ in times], [u for _, u in times], [r + u for r, u in times])
    return {part: round(statistics.median(seconds), 3) for part, seconds in zip(PARTS, columns)}


def main(args: Args):
    from rich.console import Console
    from rich.table import Table

    args = with_preset(args)
    # 1) Both systems' steps.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy, questions = make(args, folder)
        cfg = step_config(args, folder)
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE, fused=True)
        clock = TakeTurns(lambda: our_step(args, policy, questions, cfg, optimizer))
        trl_trainer(args, folder, policy, questions, clock).train()
        expected = tokens_to_sample(args, args.turns)
        assert clock.sampled_tokens == expected, (clock.sampled_tokens, expected)
    # 2) Their medians and ratios.
    ours, theirs = medians(clock.ours), medians(clock.theirs)
    ratios = {part: round(theirs[part] / ours[part], 3) for part in PARTS}
    table = Table("", *(f"{part}, s" for part in PARTS))
    table.add_row("ours", *(f"{ours[part]:.1f}" for part in PARTS))
    table.add_row("trl", *(f"{theirs[part]:.1f}" for part in PARTS))
    table.add_row("ratio", *(f"{ratios[part]:.2f}×" for part in PARTS), style="bold")
    Console().print(table)
    if args.json:
        result = {f"ours_{part}": ours[part] for part in PARTS}
        result |= {f"trl_{part}": theirs[part] for part in PARTS}
        result["ratio_vs_trl"] = ratios["step"]
        result["ratio_vs_trl_rollout"] = ratios["rollout"]
        result["ratio_vs_trl_update"] = ratios["update"]
        print(json.dumps(result))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
