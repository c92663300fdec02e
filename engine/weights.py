"""Where a policy's weights come from: names, configurations, files, each rank's share of them."""

import json
import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from files.records import refuse_code


def check_name(name: str | Path):
    """Raises FileNotFoundError for what can be neither a model folder nor a Hugging Face name."""
    folder = Path(name)
    if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        return
    ours = folder.parts[:1] in (("runs",), ("assets",), ("data",))
    if folder.exists() or ours or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(
            f"{name} is neither a model folder (it has no config.json) nor a Hugging Face name "
            "like org/model"
        )


def load_config(name: str | Path):
    """The configuration of a Qwen2.5-VL, for adapters of their base. Raises as `load_policy`."""
    from transformers import AutoConfig

    base = base_of(name)
    for folder in (name, base):
        check_name(folder)
        refuse_code(folder)
    try:
        config = AutoConfig.from_pretrained(base)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{base} is no folder here and could not be had from Hugging Face: {reason}"
        ) from None
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"{base} holds a {config.model_type} model; this code trains qwen2_5_vl")
    return config


def read_recipe(folder: str | Path) -> dict:
    """The settings that a checkpoint was trained with; {} where it does not say."""
    return read_object(Path(folder) / "recipe.json")


def base_of(name: str | Path) -> str | Path:
    """The model that a folder's adapters were trained on; `name` where it holds no adapters."""
    settings = read_object(Path(name) / "adapter_config.json")
    return settings.get("base_model_name_or_path", name)


def read_object(path: Path) -> dict:
    """{} where there is no such file. Raises ValueError where it holds something else."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds {str(found)[:40]!r}, no settings")
    return found


def check_device(name: str | Path, device: str):
    """Raises ValueError where a CPU would be given a model that it cannot train in a lifetime."""
    width = load_config(name).get_text_config().hidden_size
    if str(device) == "cpu" and width >= 1024:
        raise ValueError(
            f"{name} needs a GPU, and PyTorch {torch.__version__} finds none: is the driver new "
            f"enough for CUDA {torch.version.cuda} (nvidia-smi)? A CPU trains the tiny preset"
        )


def computes_in(name: str | Path, config, device: str) -> torch.dtype:
    """What a checkpoint is used in where nothing else is asked for: what it holds.

    Ours hold float32 masters. On a GPU they are used in what they were trained in, which their
    recipe.json says. float16 is for files: on a CPU it is float32.
    """
    on_gpu = str(device).startswith("cuda")
    recipe = read_recipe(name)
    if on_gpu and recipe:
        return getattr(torch, recipe.get("dtype", "float32"))
    held = config.dtype or torch.float32
    return torch.float32 if held == torch.float16 and not on_gpu else held


def empty_model(config, dtype, attn_implementation: str):
    """A model without memory for its weights."""
    from accelerate import init_empty_weights
    from transformers import Qwen2_5_VLForConditionalGeneration

    with init_empty_weights():
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.tie_weights()
    return model


def add_adapters(model, rank: int, base: str | Path):
    """Fresh LoRA adapters on every linear layer of the language model; the rest is frozen."""
    from peft import LoraConfig

    model.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            base_model_name_or_path=str(base),
            target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        )
    )


def load_adapters(model, folder: str | Path, is_trainable: bool):
    """A checkpoint's adapters, as they were saved: float32. peft alone would round them to the
    model's dtype.
    """
    model.load_adapter(str(folder), is_trainable=is_trainable)
    parameters = dict(model.named_parameters())
    for name, saved in load_file(Path(folder) / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        parameters[name].data = saved.to(parameters[name].device)


def parameter_name(key: str) -> str:
    """A tensor's name in a released checkpoint, to its name in the model.

    >>> parameter_name("visual.merger.ln_q.weight"), parameter_name("model.norm.weight")
    ('model.visual.merger.ln_q.weight', 'model.language_model.norm.weight')
    >>> parameter_name("lm_head.weight")
    'lm_head.weight'
    """
    key = re.sub(r"^visual\.", "model.visual.", key)
    return re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", key)


@torch.no_grad()
def load_shards(model, name: str, device: str, offload: bool = False):
    """Give a sharded model without memory its weights.

    Each rank reads only its own rows from the memory-mapped files: no rank, and no node's memory,
    ever holds more than one copy. Raises OSError for missing or misshapen tensors.
    """
    # 1) which file holds which tensor
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    opened = cache(lambda file: safe_open(folder / file, "pt"))
    places = {}  # {parameter: (file, its name there)}
    for file in files:
        for key in opened(file).keys():  # noqa: SIM118 (a safetensors handle is no dict)
            places[parameter_name(key)] = file, key

    # 2) memory; `to_empty` also empties the buffers, which are in no file
    buffers = {path: buffer.to(device) for path, buffer in model.named_buffers()}
    model.to_empty(device="cpu" if offload else device)
    for path, buffer in buffers.items():
        owner, _, last = path.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer

    # 3) this rank's rows of every tensor
    for path, parameter in model.named_parameters():
        if path not in places:
            raise OSError(f"{folder} does not hold {path}")
        file, key = places[path]
        rows = opened(file).get_slice(key)
        found, wanted = tuple(rows.get_shape()), tuple(parameter.shape)
        if found != wanted:
            raise OSError(f"{path} is {found} in {folder}; its config.json says {wanted}")
        mesh = parameter.device_mesh
        shards, number = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
        size = -(-wanted[0] // shards)  # rows per shard, rounded up
        mine = parameter.to_local()
        start = min(number * size, wanted[0])
        mine.copy_(rows[start : start + len(mine)])
