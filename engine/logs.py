"""Where a run's figures go: metrics.jsonl always, TensorBoard and Weights & Biases where asked for; rank 0 only."""

import json
from dataclasses import asdict

from distributed import world


def open_log(cfg):
    """A function that takes a record, {name: value} with a "step". Raises ValueError when what was asked for is not installed."""
    if world()[0]:
        return lambda record: None
    cfg.out.mkdir(parents=True, exist_ok=True)
    writer = run = None
    if cfg.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs its package: pip install tensorboard") from None
        writer = SummaryWriter(str(cfg.out / "tensorboard"))
    if cfg.wandb:
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb needs its package: pip install wandb") from None
        plain = {
            k: v if v is None or isinstance(v, (int, float, bool)) else str(v)
            for k, v in asdict(cfg).items()
        }
        run = wandb.init(
            project=cfg.wandb,
            name=cfg.out.name,
            id=cfg.out.name,
            resume="allow",
            dir=str(cfg.out),
            config=plain,
        )

    def log(record: dict):
        with open(cfg.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        numbers = {
            name: value
            for name, value in record.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        if writer:
            for name, value in numbers.items():
                writer.add_scalar(name, value, record["step"])
            writer.flush()
        if run:
            run.log(numbers, step=record["step"])

    return log
