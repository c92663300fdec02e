"""Rollouts on inference servers, for those who outgrow one node: `--sampler endpoint`.

    torchrun … train.py paper --sampler endpoint --endpoint http://a:8000/v1,http://b:8000/v1
    VLLM_SERVER_DEV_MODE=1 vllm serve runs/paper/served …      # on a and b, once train.py waits

A server has to answer chat completions as vLLM does: it goes on with an unfinished assistant's
message, and returns the ids of its tokens and their log-probabilities. Every `endpoint_every` steps
the weights are written to OUT/served, and the servers load them by calls of their own.

What the servers sample is off-policy: their weights may be older, their kernels differ, and they
tokenise what has been written so far again. So old log-probabilities are computed by the training
pass (`recompute_logprobs`), the servers' own say how far off they were (`logprob_diff_…`), and
`max_rollout_ratio` weighs by both. Not measured on GPUs; tested against a small server.
"""

import base64
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from engine.distributed import STOP_REQUESTS, Preempted, all_or_none, alone, world
from engine.endpoint import api_key, open_client
from engine.text import message_texts
from engine.turns import add_turn, is_greedy, turn_room
from files.images import image_bytes, open_image
from files.records import KnowledgeBaseError

PATIENCE = 15  # minutes in which a server has to start, or to load; ranks wait for 20
HANDED = {}  # {OUT: the step whose weights the servers have}, of this process


class ServerError(KnowledgeBaseError):
    """An inference server that cannot be used. As when a search fails, finished steps are saved."""


@cache
def connect(address: str):
    """(client, name of the model) of one server."""
    # Together 15 minutes, less than a rank waits for another (distributed.start).
    client = open_client(address, retries=2, seconds=300)
    return client, client.models.list().data[0].id


def credentials() -> dict[str, str]:
    """The header that the client sends, for calls that it does not know."""
    return {"Authorization": f"Bearer {api_key()}"}


class ServedSampler:
    """`read` and `write` as in samplers.py. Each rank asks one server.

    Raises ServerError where the server fails for good, or answers something else than was asked.
    """

    def __init__(self, policy, responses: list, cfg, closing, generator=None, any_left=alone):
        self.policy, self.cfg, self.closing = policy, cfg, closing
        self.tokenizer = policy.tokenizer
        self.generator, self.any_left = generator, any_left
        addresses = addresses_of(cfg)
        self.address = addresses[world()[0] % len(addresses)]
        forbidden = torch.isinf(policy.bias[: len(policy.tokenizer)]).nonzero().flatten()
        self.forbidden = dict.fromkeys(map(str, forbidden.tolist()), -100)
        self.firsts = {}  # {id of a prompt: the content of its message}

    def read(self, active: list):
        """Nothing to do: a request holds everything."""

    def write(self, active: list):
        if not self.any_left(bool(active)) or not active:
            return
        device = self.policy.device
        seeds = torch.randint(2**31, (len(active),), generator=self.generator, device=device)
        with ThreadPoolExecutor(self.cfg.rollout_rows) as pool:
            turns = list(pool.map(self.turn, active, seeds.tolist()))
        for response, (ids, logprobs) in zip(active, turns):
            add_turn(response, ids, logprobs, self.tokenizer)

    def turn(self, response, seed: int) -> tuple[list[int], list[float]]:
        """The ids and log-probabilities of a response's next turn."""
        from openai import OpenAIError

        cfg, question = self.cfg, response.question
        content = self.firsts.get(id(response.prompt)) or first_content(question, cfg)
        self.firsts[id(response.prompt)] = content
        messages = [{"role": "user", "content": content}]
        written = self.tokenizer.decode([*question.opening, *response.own_ids().tolist()])
        if written:
            messages.append({"role": "assistant", "content": written})
        extra = {
            "add_generation_prompt": not written,
            "continue_final_message": bool(written),
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        if cfg.max_pixels:
            limits = {"min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels}
            extra["mm_processor_kwargs"] = limits
        try:
            client, model = connect(self.address)
            done = client.chat.completions.create(
                model=model,
                messages=messages,
                temperature=0.0 if is_greedy(response, cfg) else cfg.temperature,
                top_p=cfg.top_p,
                max_tokens=turn_room(response, cfg),
                stop=list(self.closing),
                seed=seed,
                logprobs=True,
                logit_bias=self.forbidden,
                extra_body=extra,
            )
        except OpenAIError as error:
            raise ServerError(f"the inference server at {self.address} failed: {error}") from None
        return self.read_answer(done, response)

    def read_answer(self, done, response) -> tuple[list[int], list[float]]:
        try:
            choice = done.choices[0]
            ids = [int(token) for token in choice.token_ids]
            logprobs = [float(token.logprob) for token in choice.logprobs.content]
            asked = [int(token) for token in done.prompt_token_ids]
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ServerError(
                f"the inference server at {self.address} returns no token ids with their "
                f"log-probabilities ({error}); vLLM from 0.10.2 does"
            ) from None
        wrong = ""
        if not 0 < len(ids) == len(logprobs) <= turn_room(response, self.cfg):
            wrong = f"{len(ids)} tokens, {len(logprobs)} log-probabilities"
        elif not all(0 <= token < len(self.policy.bias) for token in ids):
            wrong = "a token that is none"
        elif any(str(token) in self.forbidden for token in ids):
            wrong = "a token that logit_bias forbids"
        elif not response.own_length and asked not in self.ways_to_say(response.token_ids.tolist()):
            wrong = (
                f"to a prompt of {len(asked)} tokens instead of {len(response.token_ids)}: another "
                "chat template, tokenizer, or limits on pictures"
            )
        if wrong:
            raise ServerError(f"the inference server at {self.address} answered with {wrong}")
        return ids, logprobs

    def ways_to_say(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """A prompt's ids, and the same with one token per picture: some servers say it so."""
        pad = self.policy.model.config.image_token_id
        before = [None, *ids[:-1]]
        return ids, [token for token, last in zip(ids, before) if not token == last == pad]


def first_content(question, cfg) -> list[dict]:
    """The user's message: texts, and pictures where the question has them."""
    texts = message_texts(cfg.instructions, question.problem)
    parts = [{"type": "text", "text": texts[0]}]
    for image, text in zip(question.images, texts[1:], strict=True):
        data = base64.b64encode(image_bytes(open_image(image))).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        parts.append({"type": "text", "text": text})
    return [part for part in parts if part.get("text") != ""]


def addresses_of(cfg) -> list[str]:
    return [address.strip().rstrip("/") for address in cfg.endpoint.split(",")]


# --------------------------------------------------------------------------- handing over weights


def hand_over(policy, cfg, step: int):
    """Before a step's rollouts: give the servers this policy's weights, where it is time to.

    All ranks call it while their weights are whole. The first time it waits until every server has
    started. Raises ServerError.
    """
    if cfg.sampler != "endpoint":
        return
    last = HANDED.get(cfg.out)
    if last is not None and step - last < cfg.endpoint_every:
        return
    with all_or_none(alone, policy.device, ServerError):
        if world()[0] == 0:
            write_served(policy, cfg)
            deadline = time.monotonic() + 60 * PATIENCE  # of all together: other ranks wait
            for address in addresses_of(cfg):
                if last is None:
                    wait_for(address, cfg, deadline)
                for call in cfg.endpoint_reload:
                    post(address, call, deadline)
    HANDED[cfg.out] = step


def write_served(policy, cfg):
    """OUT/served: the weights in the precision they are sampled with, and the processor."""
    out, work = cfg.out / "served", cfg.out / ".served.writing"
    shutil.rmtree(work, ignore_errors=True)
    weights = {name: tensor.detach().cpu() for name, tensor in policy.model.named_parameters()}
    if policy.model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # the same numbers as the embeddings
    policy.model.save_pretrained(work, state_dict=weights, max_shard_size="5GB")
    policy.processor.save_pretrained(work)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)


def wait_for(address: str, cfg, deadline: float):
    import requests

    said = False
    while True:
        try:
            answer = requests.get(f"{address}/models", headers=credentials(), timeout=5)
            answer.raise_for_status()
            return
        except requests.RequestException as error:
            if STOP_REQUESTS:
                raise Preempted from None
            if error.response is not None and error.response.status_code in (401, 403):
                raise ServerError(f"{address} refuses OPENAI_API_KEY: {error}") from None
            if time.monotonic() > deadline:
                raise ServerError(f"no inference server at {address}: {error}") from None
        if not said:
            print(f"waiting for {address} to serve {cfg.out / 'served'}", flush=True)
            said = True
        time.sleep(1)


def post(address: str, call: str, deadline: float):
    """call: a path on the server, above /v1, and after a space the JSON that is sent to it."""
    import requests

    path, _, body = call.partition(" ")
    url = address.removesuffix("/v1") + path
    seconds = max(1.0, deadline - time.monotonic())
    try:
        answer = requests.post(
            url, json=json.loads(body or "{}"), headers=credentials(), timeout=seconds
        )
        answer.raise_for_status()
    except (requests.RequestException, ValueError) as error:
        raise ServerError(f"{url} did not load the weights: {error}") from None
