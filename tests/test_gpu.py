"""What only a GPU runs, as far as a CPU and tensors without numbers can show it."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import faiss
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, WARMSTART
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import evaluate
from benchmarks import memory
from config import PRESETS
from engine import (
    checkpoint,
    cost,
    distributed,
    gpu_check,
    samplers,
    shared_prompt,
    vision_attention,
)
from engine.weights import check_name, computes_in, load_config, load_shards
from evaluation import partial
from knowledge.client import connect
from model import load_policy
from retrieval import KnowledgeBase, KnowledgeBaseError
from rollout import build_prompt, sample

HUB_NAME = "Qwen/Qwen2.5-VL-3B-Instruct"


def logprobs_of(policy, responses) -> torch.Tensor:
    policy.model.train()
    return policy.logprobs(responses)[0]


@pytest.fixture(scope="module")
def responses(policy, kb, mixed):
    cfg = replace(PRESETS["tiny"], group_size=2)
    return sample(policy, kb, mixed[:3], cfg, torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------- names, numbers


def test_a_hub_name_stays_one_beside_a_folder_of_its_first_half(tmp_path, monkeypatch):
    """The first evaluation of Qwen/… must not make the second one fail."""
    monkeypatch.chdir(tmp_path)
    folder = partial.default_folder(evaluate.Args(ckpt=Path(HUB_NAME)))
    assert folder == Path("runs/Qwen-Qwen2.5-VL-3B-Instruct/eval")
    Path("Qwen").mkdir()
    check_name(HUB_NAME)
    for name in ("runs/a/b", "/nowhere/model", "model"):
        with pytest.raises(FileNotFoundError, match="neither a model folder"):
            check_name(name)


def test_a_checkpoint_is_used_on_a_gpu_in_what_it_was_trained_in(tmp_path):
    config = load_config(WARMSTART)
    (tmp_path / "recipe.json").write_text('{"dtype": "bfloat16"}')
    assert computes_in(tmp_path, config, "cuda:0") == torch.bfloat16
    assert computes_in(tmp_path, config, "cpu") == torch.float32
    assert computes_in("released/model", config, "cuda:0") == config.dtype


def test_a_large_model_is_not_trained_on_a_cpu_in_silence(tmp_path):
    config = json.loads((WARMSTART / "config.json").read_text())
    config["text_config"]["hidden_size"] = 2048
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="needs a GPU, and PyTorch .* finds none"):
        checkpoint.load(replace(PRESETS["paper"], init=str(tmp_path)), "cpu")


# -------------------------------------------------------------------------------------- attention


def test_the_vision_towers_attention_is_chosen_by_what_is_computed_in():
    choose = vision_attention.choose
    assert choose("auto", torch.float32, "cuda:0") == "sdpa"
    assert choose("auto", torch.bfloat16, "cpu") == "sdpa"
    assert choose("auto", torch.bfloat16, "cuda:0") in (vision_attention.NAME, "flash_attention_2")
    assert choose("eager", torch.bfloat16, "cuda:0") == "eager"


def windows_alone(query, key, value, ends, _, longest, __, scale):
    """`varlen_attn`, for a CPU: (L, H, D) each, window by window."""
    assert longest == (ends[1:] - ends[:-1]).max()
    out = torch.empty_like(query)
    for start, end in zip(ends[:-1], ends[1:]):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        attended = scaled_dot_product_attention(q, k, v, scale=scale)[0]
        out[start:end] = attended.transpose(0, 1)
    return out


def test_the_variable_length_call_means_what_sdpa_per_window_means(policy, mixed, cfg, monkeypatch):
    """The kernel itself needs a GPU: here its documented meaning stands in for it."""
    monkeypatch.setattr(vision_attention, "varlen_attn", windows_alone)
    prompt = build_prompt(policy, mixed[-1], cfg)
    other = load_policy(WARMSTART, torch.float32, vision_attention.NAME)
    seen = [
        of.model.model.visual(prompt.pixel_values, grid_thw=prompt.image_grid_thw).pooler_output
        for of in (policy, other)
    ]
    assert other.model.model.visual.config._attn_implementation == vision_attention.NAME
    torch.testing.assert_close(*seen)
    # transformers makes no model of such a configuration, but the plan of a run counts its parts
    assert cost.parameter_counts(other.model.config) == cost.parameter_counts(policy.model.config)
    assert other.model.model.visual.config._attn_implementation == vision_attention.NAME


def test_the_variable_length_kernel_takes_what_it_is_given():
    """Its checks of shapes and types, forward and backward, without numbers and without a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (
            torch.empty(1, 4, 96, 80, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for _ in range(3)
        )
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        out, _ = vision_attention.attend(
            None, query, key, value, scaling=0.1, cu_seq_lens_q=ends, max_length_q=64
        )
        assert out.shape == (1, 96, 4, 80)


def test_a_masked_call_repeats_the_keys_itself(policy, kb, mixed, monkeypatch):
    """With a mask and `enable_gqa` a GPU has no kernel that saves memory."""
    calls = []

    def watched(query, key, value, mask=None, **options):
        calls.append((query.shape[1], key.shape[1], options))
        return scaled_dot_product_attention(query, key, value, mask, **options)

    monkeypatch.setattr(shared_prompt, "scaled_dot_product_attention", watched)
    sample(policy, kb, mixed[:1], replace(PRESETS["tiny"], group_size=2))
    assert len(calls) > 4
    text = policy.model.config.get_text_config()
    assert text.num_key_value_heads < text.num_attention_heads
    for query_heads, key_heads, options in calls:
        assert query_heads == key_heads
        assert not options.get("enable_gqa")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ----------------------------------------------------------------------------------------- memory


def test_observations_are_fed_in_slices(policy, kb, mixed, cfg, monkeypatch):
    """Of at most so many tokens; what is sampled does not change."""
    cfg = replace(cfg, group_size=2, temperature=0.0)
    whole = sample(policy, kb, mixed, cfg)
    sizes = []
    forward = samplers.SharedPromptSampler.forward

    def watched(self, input_ids, position_ids, **images):
        if self.cache.prompts[0] is not None and input_ids.shape[1] > 1:
            sizes.append(input_ids.numel())
        return forward(self, input_ids, position_ids, **images)

    monkeypatch.setattr(samplers, "CHUNK_TOKENS", 100)
    monkeypatch.setattr(samplers.SharedPromptSampler, "forward", watched)
    sliced = sample(policy, kb, mixed, cfg)
    assert len(sizes) > 10
    assert max(sizes) <= 100
    for one, other in zip(whole, sliced):
        assert one.token_ids.equal(other.token_ids)
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


def test_scores_are_not_rounded_to_bfloat16_before_their_softmax():
    """On a GPU the product itself gives float32; here keys are widened first."""
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(2, 2, n, 64, generator=generator).bfloat16() for n in (1, 50))
    exact = query.double() @ keys.double().transpose(2, 3)
    found = shared_prompt.products(query, keys)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-4
    rounded = (query @ keys.transpose(2, 3)).double()
    assert (rounded - exact).abs().max() > 1e-2
    with FakeTensorMode():
        on_gpu = [torch.empty(2, 2, n, 64, dtype=torch.bfloat16, device="cuda") for n in (1, 50)]
        out = shared_prompt.products(*on_gpu)
    assert (out.shape, out.dtype) == (exact.shape, torch.float32)


def test_each_rank_gets_its_share_of_the_cores(monkeypatch):
    """Also FAISS, whose wheel brings an OpenMP of its own."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(faiss, "omp_set_num_threads", asked.append)
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda _: set(range(16)))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    distributed.share_cores()
    assert asked == []  # one process has all of them anyhow
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what torchrun sets
    distributed.share_cores()
    assert asked == [4, 4]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # what somebody chose
    distributed.share_cores()
    assert asked == [4, 4]


def test_tied_weights_are_saved_once(tmp_path):
    cfg = replace(PRESETS["tiny"], out=tmp_path)
    policy, optimizer, *_ = checkpoint.load(cfg, "cpu")
    assert policy.model.config.tie_word_embeddings
    checkpoint.save(policy, optimizer, cfg, {"step": 1}, [])
    with safe_open(tmp_path / "latest" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert any("embed_tokens" in name for name in names)
    assert not any("lm_head" in name for name in names)
    again = load_policy(tmp_path / "latest", torch.float32)
    head = again.model.lm_head.weight
    assert head is again.model.get_input_embeddings().weight
    assert head.equal(policy.model.lm_head.weight)


@pytest.mark.parametrize(
    ("preset", "gpus", "layers"),
    [pytest.param("paper", 8, 2, marks=pytest.mark.slow), ("small", 1, 1)],
)
def test_the_plan_says_what_is_allocated(preset, gpus, layers):
    """The exact shapes of the 7B and the 3B, a layer or two: loaded, sharded, a packed update,
    prompts, observations and tokens, on tensors without numbers.
    """
    rows = memory.measure(memory.Args(preset=preset, gpus=gpus, layers=layers))
    counted, planned = {}, {}
    for name, most, plan in rows:
        phase = name.split(":")[0]
        counted[phase] = max(most, counted.get(phase, 0))
        planned[phase] = plan
    assert counted["weights"] == pytest.approx(planned["weights"], rel=0.01)
    assert counted["updating"] == pytest.approx(planned["updating"], rel=0.15)
    # with all layers the cache is most of it, and the two are nearer
    assert counted["sampling"] == pytest.approx(planned["sampling"], rel=0.25)
    assert not dist.is_initialized()


# ----------------------------------------------------------------------------- bfloat16, adapters


def test_the_packed_attention_adds_up_in_float32(responses):
    """In bfloat16, too: what training computes is near what the rollout computed."""
    policies = [load_policy(WARMSTART, dtype) for dtype in (torch.bfloat16, torch.float64)]
    rounded, exact = (logprobs_of(policy, responses).double() for policy in policies)
    rounded.sum().backward()
    written = exact != 0
    assert (rounded - exact)[written].abs().mean() < 0.02


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_checkpointing_changes_no_gradient_in_bfloat16(one_rank, responses):
    """Sharded weights are cast around each layer: the same in the pass that computes it again."""

    def place(model, name):
        distributed.shard(model, torch.bfloat16)
        load_shards(model, name, "cpu")

    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(WARMSTART, torch.float32, "sdpa", "cpu", place)
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        logprobs_of(policy, responses).sum().backward()
        gradients.append({name: p.grad.full_tensor() for name, p in trained(policy).items()})
    plain, again = gradients
    assert any("visual" in name for name in plain)
    for name, gradient in plain.items():
        assert gradient.equal(again[name]), name


def trained(policy) -> dict:
    return {name: p for name, p in policy.model.named_parameters() if p.grad is not None}


def test_a_frozen_vision_tower_is_not_trained_through(responses, tmp_path):
    """With adapters and checkpointing; the adapters' gradients stay what they are without it."""
    cfg = replace(PRESETS["tiny"], lora_rank=2, freeze_vision=True, out=tmp_path)
    gradients = []
    for checkpointing in (False, True):
        cfg = replace(cfg, activation_checkpointing=checkpointing)
        policy, *_ = checkpoint.load(cfg, "cpu")
        needs = []
        policy.model.model.visual.blocks[-1].register_forward_hook(
            lambda module, given, out, needs=needs: needs.append(out.requires_grad)
        )
        logprobs_of(policy, responses).sum().backward()
        assert needs == [False]
        gradients.append({name: p.grad for name, p in trained(policy).items()})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, again[name])


# ---------------------------------------------------------------------------------------- indexes


def test_an_index_goes_to_the_ranks_own_gpu_and_only_when_asked(kb_folder, monkeypatch):
    """The package for GPUs is not here; which GPU it would be given is seen all the same."""
    taken = []

    def to_gpu(resources, number, index):
        taken.append(number)
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 8, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    KnowledgeBase.open(kb_folder)
    assert taken == []
    KnowledgeBase.open(kb_folder, gpu=3)
    assert taken == [3, 3]
    with pytest.raises(KnowledgeBaseError, match="needs a GPU"):
        connect(kb_folder, device="cpu", index_device="gpu")


# -------------------------------------------------------------------------- the first half hour


def test_the_check_of_a_machine_runs_on_a_cpu_and_says_what_it_skips(
    kb_folder, data_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu_check, "ROWS", (2,))
    monkeypatch.setattr(gpu_check, "STEPS", 3)
    small = replace(PRESETS["tiny"], questions_per_step=2)
    monkeypatch.setitem(gpu_check.PRESETS, "tiny", small)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))  # the workers of these tests have one
    args = gpu_check.Args(
        kb=kb_folder,
        data=data_folder,
        questions=2,
        work=tmp_path / "work",
        out=tmp_path / "check.json",
    )
    try:
        assert gpu_check.main(args) == 0
    finally:
        faiss.omp_set_num_threads(threads)
    report = json.loads(args.out.read_text())
    figures = [figure for part in report.values() for figure in part]
    verdicts = Counter(figure["verdict"] for figure in figures)
    assert verdicts["FAIL"] == 0
    assert verdicts["PASS"] >= 12
    skipped = {f["name"]: f["wanted"] for f in figures if f["verdict"] == "SKIP"}
    assert skipped["driver"] == "no GPU"
    assert skipped["N ranks are one"] == "start it with torchrun"
    assert f"{verdicts['PASS']} PASS, 0 FAIL, 4 SKIP" in capsys.readouterr().out


def test_the_check_of_a_machine_fails_where_log_probs_are_not_the_same(
    kb, mixed, tmp_path, monkeypatch
):
    """A wrong rotary embedding, say: here plain scores are shifted by a hundredth."""
    plain = gpu_check.plain
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu_check, "plain", lambda *args: [x + 0.01 for x in plain(*args)])
    figures = gpu_check.parity(gpu_check.Args(), "cpu", kb, mixed[:4])
    failed = [figure.name for figure in figures if figure.verdict == "FAIL"]
    assert failed == ["log-probs, ours − transformers'"]
