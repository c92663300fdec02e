"""The memory of a run, counted: the exact model on tensors without numbers, against `--plan`.

    python -m benchmarks.memory                  # the paper preset on 8 ranks, some minutes
    python -m benchmarks.memory --preset small --gpus 1
    python -m benchmarks.memory --layers 4       # the same widths, fewer layers: in seconds

Every operation runs, sharding included, but no number is computed: PyTorch's fake tensors, and its
process group that only pretends to send. What is counted is every storage that is alive. That is
what PyTorch's allocator would be asked for, without what it loses to rounding and fragments, and
without the GPU's own context. Attention's kernels are the CPU's, which keep what a GPU's keep.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import PRESETS
from engine import cost, distributed, samplers, shared_prompt
from engine.packing import pack
from engine.weights import add_adapters, empty_model
from model import Policy, Prompt, sampled_distribution, score_tokens

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
IMAGE = (31, 32)  # a picture's tokens: rows, columns
TEXT = 308  # tokens of a prompt beside its pictures: 1,300 with one
SAMPLED = 430  # tokens of a response that are trained on
resize = torch.UntypedStorage.resize_


@dataclass
class Args:
    """Count the memory of a preset's phases, and compare it with the plan."""

    preset: Literal["paper", "small"] = "paper"
    gpus: int = 8
    layers: int | None = None  # of the language model and the vision tower each; None: all


class Tracker(TorchDispatchMode):
    """Bytes of all storages that are alive: now, and at most."""

    def __init__(self):
        super().__init__()
        self.held = {}  # address → [weak reference, bytes]
        self.now = self.most = 0

    def __enter__(self):
        torch.UntypedStorage.resize_ = lambda storage, size: self.resized(storage, size)
        return super().__enter__()

    def __exit__(self, *problem):
        torch.UntypedStorage.resize_ = resize
        return super().__exit__(*problem)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out

    def see(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.held:
            if not torch.UntypedStorage._expired(self.held[address][0]):
                return
            self.drop(address)  # another storage has its place
        self.held[address] = [storage._weak_ref(), storage.nbytes()]
        self.add(storage.nbytes())

    def resized(self, storage, size: int):
        """FSDP frees gathered weights by making their storages empty."""
        resize(storage, size)
        entry = self.held.get(storage._cdata)
        if entry:
            entry[1], before = size, entry[1]
            self.add(size - before)
        return storage

    def drop(self, address: int):
        reference, size = self.held.pop(address)
        torch.UntypedStorage._free_weak_ref(reference)
        self.now -= size

    def sweep(self):
        for address, (reference, _) in list(self.held.items()):
            if torch.UntypedStorage._expired(reference):
                self.drop(address)

    def add(self, size: int):
        self.now += size
        if self.now > self.most:
            self.sweep()
            self.most = max(self.most, self.now)

    def peak_of(self, work) -> float:
        """The most bytes that are alive while work() runs."""
        self.sweep()
        self.most = self.now
        with self:
            work()
        return self.most


# --------------------------------------------------------------------------------- what is counted


def fake_policy(cfg, layers: int | None) -> Policy:
    """The preset's policy as a rank of a training run holds it, without numbers."""
    config = planned_config(cfg, layers)
    adapters = cfg.lora_rank > 0
    model = empty_model(config, torch.bfloat16 if adapters else torch.float32, "sdpa")
    if adapters:
        add_adapters(model, cfg.lora_rank, cfg.init)
    fill(model)
    if not adapters:
        distributed.shard(model, torch.bfloat16)
    model.config.get_text_config()._attn_implementation = shared_prompt.NAME
    if cfg.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapters:
            model.disable_input_require_grads()
    bias = torch.zeros(config.text_config.vocab_size)
    tokenizer = SimpleNamespace(pad_token_id=0)
    return Policy(model, SimpleNamespace(tokenizer=tokenizer), bias)


def fill(model):
    """Give a model without memory parameters that pretend to have some; adapters in float32."""
    made = {}  # a tied parameter is one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                adapter = "lora" in type(module).__name__.lower() or parameter.requires_grad
                dtype = torch.float32 if adapter else parameter.dtype
                with FAKE:
                    fake = torch.empty(parameter.shape, dtype=dtype)
                made[id(parameter)] = torch.nn.Parameter(fake, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def planned_config(cfg, layers: int | None):
    """The released configuration, or one of the same widths with fewer layers."""
    config = cost.config_of(cfg.init)
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = ["full_attention"] * layers
        config.vision_config.depth = layers
        config.vision_config.fullatt_block_indexes = [layers - 1]
    return config


def fake_prompt(config, pictures: int = 1) -> Prompt:
    rows, columns = IMAGE
    image = [config.image_token_id] * (rows * columns)
    ids = torch.tensor([5] * TEXT + image * pictures)
    patches = 4 * rows * columns * pictures
    with FAKE:
        pixels = torch.empty(patches, 3 * 2 * 14 * 14)
    grid = torch.tensor([[1, 2 * rows, 2 * columns]] * pictures)
    return Prompt(ids, torch.arange(len(ids)).expand(3, -1), pixels, grid)


def fake_response(prompt: Prompt, length: int) -> SimpleNamespace:
    """With `length` tokens after its prompt."""
    size = len(prompt.token_ids)
    mask = torch.zeros(size + length, dtype=torch.bool)
    mask[size : size + SAMPLED] = True
    ids = torch.cat([prompt.token_ids, torch.full((length,), 5)])
    return SimpleNamespace(
        prompt=prompt, token_ids=ids, policy_mask=mask, logprobs=torch.zeros(len(ids)), greedy=False
    )


def update_bytes(tracker, policy: Policy, cfg, prompt: Prompt) -> float:
    """A forward and backward pass over one full micro-batch: a question's G responses."""
    length = (cfg.micro_tokens - len(prompt.token_ids)) // cfg.group_size
    packed = pack(
        [fake_response(prompt, length) for _ in range(cfg.group_size)], policy.device, True
    )
    policy.model.train()

    def work():
        logprobs, _ = distributed.call_sharded(
            policy.model,
            score_tokens,
            packed.predictors,
            packed.chosen,
            policy.bias,
            1.0,
            **packed.inputs,
        )
        logprobs.sum().backward()

    most = tracker.peak_of(work)
    for parameter in policy.model.parameters():
        parameter.grad = None
    return most


def sampling_bytes(tracker, policy: Policy, cfg, prompts: list[Prompt], mode=FAKE):
    """{phase: bytes}: reading the prompts; then, with caches as long as they get, an observation
    and a token. mode: in which caches are made."""
    at_once = len(prompts) * cfg.group_size
    device = policy.device
    responses = [fake_response(p, 0) for p in prompts for _ in range(cfg.group_size)]
    policy.model.eval()
    sampler = samplers.SharedPromptSampler(policy, responses, cfg, None)
    found = {}
    # there are no numbers to look at
    no_look = mock.patch.object(samplers, "check_finite", lambda logits: None)
    with no_look, tracker, distributed.gathered(policy.model), torch.no_grad():
        found["sampling: prompts"] = tracker.peak_of(sampler.read_prompts)
        cache = sampler.cache
        columns = min(samplers.CHUNK_TOKENS // at_once, cfg.max_obs_tokens)

        def forward(width: int):
            ids = torch.zeros(at_once, width, dtype=torch.long, device=device)
            cache.begin_chunk(torch.full((at_once,), width, device=device), width)
            return sampler.forward(ids, ids.expand(3, -1, -1))

        def observation():
            forward(columns)

        def token():
            distribution = sampled_distribution(forward(1), policy.bias, 1.0)
            probabilities = distribution.exp()
            probabilities * (probabilities > 0)  # the nucleus
            samplers.draw(probabilities)

        # nearly full, so that the next chunk makes it grow: the old and the new of a layer
        text = policy.model.config.get_text_config()
        cache.longest = cfg.max_tokens - 2 * columns
        cache.capacity = cache.longest + 1
        cache.lengths.fill_(cache.longest)
        d = text.hidden_size // text.num_attention_heads
        shape = at_once, text.num_key_value_heads, cache.capacity, d
        like = {"dtype": cache.prompts[0][0].dtype, "device": device}
        with mode, tracker:
            for layer in range(text.num_hidden_layers):
                cache.own[layer] = torch.zeros(shape, **like), torch.zeros(shape, **like)
        found["sampling: an observation"] = tracker.peak_of(observation)
        found["sampling: a token"] = tracker.peak_of(token)
    return found


def measure(args: Args) -> list[tuple[str, float, float]]:
    """[(phase, bytes counted, bytes planned)] of what PyTorch allocates beside the encoders."""
    cfg = PRESETS[args.preset]
    dist.init_process_group("fake", rank=0, world_size=args.gpus, store=FakeStore())
    try:
        # 1) what always lives
        policy = fake_policy(cfg, args.layers)
        tracker = Tracker()
        for tensor in [*policy.model.parameters(), *policy.model.buffers()]:
            tracker.see(tensor.to_local() if hasattr(tensor, "to_local") else tensor)
        weights = tracker.now
        config = policy.model.config
        counts = cost.parameter_counts(config)
        plan = cost.memory(cfg, config, counts, args.gpus, min(args.gpus, 8))
        rows = [("weights", weights, plan["weights"])]
        # 2) the phases; the optimizer's moments lie beside them
        moments = plan["optimizer"]
        counted = {
            f"updating: {n} pictures": update_bytes(tracker, policy, cfg, fake_prompt(config, n))
            for n in (1, 4)
        }
        at_once = min(cfg.rollout_rows, cfg.questions_per_step * cfg.group_size // args.gpus)
        prompts = [fake_prompt(config) for _ in range(at_once // cfg.group_size)]
        counted |= sampling_bytes(tracker, policy, cfg, prompts)
        for name, most in counted.items():
            phase = name.split(":")[0]
            rows.append((name, most + moments, cost.phase_bytes(plan, phase)))
        return rows
    finally:
        dist.destroy_process_group()


def main(args: Args):
    from rich.console import Console
    from rich.table import Table

    table = Table("GiB", "counted", "planned", "", title=f"{args.preset}, {args.gpus} ranks")
    for name, counted, planned in measure(args):
        table.add_row(
            name,
            f"{counted / cost.GIB:.1f}",
            f"{planned / cost.GIB:.1f}",
            f"{planned / counted - 1:+.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
