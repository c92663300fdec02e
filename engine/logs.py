"""Where a run's figures go: metrics.jsonl always, TensorBoard and Weights & Biases where asked for.

Only rank 0 writes.
"""

import json
from dataclasses import asdict

from engine.distributed import world


def open_log(cfg):
    """A function that writes a record, {name: value} with a "step".

    Raises ValueError when what was asked for is not installed.
    """
    rank, _ = world()
    if rank != 0:
        return lambda record: None
    cfg.out.mkdir(parents=True, exist_ok=True)
    tensorboard = open_tensorboard(cfg) if cfg.tensorboard else None
    wandb_run = open_wandb(cfg) if cfg.wandb else None

    def log(record: dict):
        with open(cfg.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        step = record["step"]
        numbers = {
            name: value
            for name, value in record.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        if tensorboard:
            for name, value in numbers.items():
                tensorboard.add_scalar(name, value, step)
            tensorboard.flush()
        if wandb_run:
            wandb_run.log(numbers, step=step)

    return log


def open_tensorboard(cfg):
    """A TensorBoard writer into OUT/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs its package: pip install tensorboard") from None
    return SummaryWriter(str(cfg.out / "tensorboard"))


def open_wandb(cfg):
    """A Weights & Biases run, named after OUT, that a resumed run goes on with."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs its package: pip install wandb") from None

    def plain(value):
        return value if value is None or isinstance(value, (int, float, bool)) else str(value)

    return wandb.init(
        project=cfg.wandb,
        name=cfg.out.name,
        id=cfg.out.name,
        resume="allow",
        dir=str(cfg.out),
        config={name: plain(value) for name, value in asdict(cfg).items()},
    )
