"""A whole training step side by side: ours, and TRL's GRPOTrainer.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train_step.py                         # the paper's lengths, a small policy, two CPU cores
    python benchmarks/train_step.py --questions 2 --repeats 1 --json

A step is: sample G responses a question over several turns with observations, reward them, one optimizer step with the
token-level clipped loss, observations masked out. Same policy, questions, numbers of tokens, and rewards (random ones, so that every group
teaches something); see rollout.py beside this file for the lengths. The two take turns (A B A B …).

TRL runs an agent's tools in a loop that hands `generate` the whole text so far, every turn. A policy with random weights calls
no tools, so its hook for custom rollouts forces the same turns through the trainer's own generation method, with
exactly the inputs that loop would give it. Loss "dapo", no KL, one optimizer step a generation, so that no old
log-probs are recomputed on either side; TRL's micro-batch is --micro-rows. Its faster samplers are not compared: vLLM needs a GPU, and
continuous batching takes no pictures.
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

import benchmarks.rollout as lengths
from engine.packing import update


@dataclass
class Args(lengths.Args):
    """Time training steps."""

    questions: int = 4
    turns: int = 4  # tool turns
    micro_rows: int = 4  # TRL's per_device_train_batch_size
    micro_tokens: int = 16_384  # ours
    repeats: int = 2


def rewards(n: int) -> list[float]:
    return torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()


def our_step(args: Args, model, processor, kb, questions, cfg, optimizer) -> tuple[float, float]:
    """Seconds of the rollout and of the update."""
    started = time.perf_counter()
    model.eval()
    responses = lengths.sampled(args, model, processor, kb, questions, cfg)
    middle, totals = (
        time.perf_counter(),
        torch.tensor(rewards(len(responses))).view(-1, cfg.group_size),
    )
    groups = [
        (responses[i * cfg.group_size : (i + 1) * cfg.group_size], row)
        for i, row in enumerate(totals)
    ]
    update(model, optimizer, groups, cfg, spare=responses[0])
    return middle - started, time.perf_counter() - middle


def forced_turns(args: Args, tokenizer, kb):
    """TRL's hook: what its tool loop does, were a tool called every turn."""

    def roll(prompts, trainer):
        started = time.perf_counter()
        prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
        kinds = [list(row) for row in fields["mm_token_type_ids"]]
        texts, masks = [[] for _ in prompt_ids], [[] for _ in prompt_ids]
        for turn in range(args.turns + 1):
            fields["mm_token_type_ids"] = [row + [0] * len(text) for row, text in zip(kinds, texts)]
            new, _ = trainer._generate_single_turn(
                [p + t for p, t in zip(prompt_ids, texts)], images, fields, args.group_size
            )
            for row, ids in enumerate(new):
                found = (
                    lengths.observation(args, tokenizer, kb, row, turn + 1)
                    if turn < args.turns
                    else []
                )
                texts[row] += ids + found
                masks[row] += [1] * len(ids) + [0] * len(found)
        trainer.rollout_seconds = time.perf_counter() - started
        trainer.sampled_tokens = sum(map(sum, masks))
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": texts,
            "logprobs": None,
            "env_mask": masks,
        }

    return roll


def trl_trainer(args: Args, folder: Path, processor, questions, kb, callback):
    from datasets import Dataset
    from transformers import Qwen2_5_VLForConditionalGeneration
    from trl import GRPOConfig, GRPOTrainer

    rows, cuda = args.questions * args.group_size, args.device.startswith("cuda")
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=args.repeats,
        per_device_train_batch_size=args.micro_rows,
        gradient_accumulation_steps=rows // args.micro_rows,
        num_generations=args.group_size,
        max_completion_length=(args.turns + 1) * args.turn_tokens
        + args.turns * round(args.observation_tokens * (1 + args.spread)),
        beta=0.0,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        temperature=1.0,
        top_k=0,
        learning_rate=1e-6,
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
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": q.problem.replace("<image>", "")}],
                "images": [str(q.images[0])],
            }
            for q in questions * args.repeats
        ]
    )
    data.set_transform(
        lambda batch: (
            batch | {"images": [[Image.open(path) for path in paths] for paths in batch["images"]]}
        )
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    )
    return GRPOTrainer(
        model=model.to(args.device),
        reward_funcs=[lambda prompts, **_: rewards(len(prompts))],
        args=config,
        train_dataset=data,
        processing_class=processor,
        rollout_func=forced_turns(args, processor.tokenizer, kb),
        callbacks=[callback],
    )


def main(args: Args):
    from rich.console import Console
    from rich.table import Table
    from transformers import TrainerCallback

    args = lengths.chosen(args)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, processor, questions, kb = lengths.make(args, folder)
        cfg = replace(
            lengths.config(args, args.turns),
            updates_per_step=1,
            micro_tokens=args.micro_tokens,
            lr=1e-6,
            out=folder,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        mine, theirs = [], []

        class Turns(TrainerCallback):
            def on_step_begin(self, *_, **__):
                mine.append(our_step(args, model, processor, kb, questions, cfg, optimizer))
                print(
                    f"  ours: rollout {mine[-1][0]:.1f} s, update {mine[-1][1]:.1f} s", flush=True
                )
                self.started = time.perf_counter()

            def on_step_end(self, *_, **__):
                whole = time.perf_counter() - self.started
                theirs.append((trainer.rollout_seconds, whole - trainer.rollout_seconds))
                print(
                    f"  TRL:  rollout {theirs[-1][0]:.1f} s, update {theirs[-1][1]:.1f} s",
                    flush=True,
                )

        trainer = trl_trainer(args, folder, processor, questions, kb, Turns())
        trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = (
            args.turn_tokens
        )
        trainer.generation_config.suppress_tokens = (
            model.sampling_bias.isinf().nonzero()[:, 0].tolist()
        )
        trainer.train()
        expected = args.questions * args.group_size * args.turn_tokens * (args.turns + 1)
        assert trainer.sampled_tokens == expected, (trainer.sampled_tokens, expected)
    table, result = Table("", "rollout, s", "update, s", "step, s"), {}
    for name, times in (("ours", mine), ("trl", theirs)):
        parts = [statistics.median(t[i] for t in times) for i in (0, 1)] + [
            statistics.median(map(sum, times))
        ]
        result |= {
            f"{name}_{part}": round(value, 3)
            for part, value in zip(("rollout", "update", "step"), parts)
        }
        table.add_row(name, *(f"{value:.1f}" for value in parts))
    result |= {
        f"ratio_vs_trl{suffix}": round(result[f"trl_{part}"] / result[f"ours_{part}"], 3)
        for suffix, part in (("", "step"), ("_rollout", "rollout"), ("_update", "update"))
    }
    table.add_row(
        "ratio",
        *(f"{result['ratio_vs_trl' + suffix]:.2f}×" for suffix in ("_rollout", "_update", "")),
        style="bold",
    )
    Console().print(table)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
