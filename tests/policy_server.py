"""A small inference server for the tiny policy that answers as vLLM does, in this process.

It knows nothing of our token ids: it reads the messages, writes them by the chat template,
tokenises what the assistant has written so far again, and goes on with it by `generate`.
"""

import base64
import http.server
import io
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from config import PRESETS
from data import Question
from engine.samplers import GenerateSampler
from engine.text import trusted_ids
from knowledge.batcher import Batcher
from model import load_policy
from rollout import build_prompt, new_response


class PolicyServer:
    """Serves a checkpoint folder, once it is there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.policy = None
        self.asked, self.loaded = 0, 0
        self.change = lambda answer: answer  # a test may spoil what is answered
        self.batcher = Batcher(self.write)

    def load(self):
        self.policy = load_policy(self.folder, torch.float32)
        self.policy.model.eval()
        self.loaded += 1

    def models(self) -> dict:
        model = {"id": "policy", "object": "model", "created": 0, "owned_by": "us"}
        return {"object": "list", "data": [model]}

    def answer(self, body: dict) -> dict:
        (done,) = self.batcher.submit([body], 1).result(600)
        return self.change(done[0])

    def write(self, bodies: list[dict], k: int) -> list[list[dict]]:
        with torch.random.fork_rng():
            return [[self.completion(body)] for body in bodies]

    def completion(self, body: dict) -> dict:
        cfg = replace(
            PRESETS["tiny"],
            instructions="",
            group_size=1,
            temperature=body["temperature"],
            max_turn_tokens=body["max_tokens"],
            max_tokens=10_000,
        )
        response = new_response(*prompt_of(self.policy, body["messages"][0], cfg))
        if body["continue_final_message"]:
            response.append(trusted_ids(self.policy.tokenizer, body["messages"][1]["content"]))
        asked = response.token_ids.tolist()
        torch.manual_seed(body["seed"])
        GenerateSampler(self.policy, [response], cfg, body["stop"]).write([response])
        ids = response.token_ids.tolist()[len(asked) :]
        logprobs = response.logprobs.tolist()[len(asked) :]
        self.asked += 1
        said = [{"token": str(i), "logprob": x, "top_logprobs": []} for i, x in zip(ids, logprobs)]
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": response.turn_text},
            "logprobs": {"content": said},
            "token_ids": ids,
        }
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "policy",
            "choices": [choice],
            "prompt_token_ids": asked,
        }


def prompt_of(policy, message: dict, cfg) -> tuple:
    """(question, prompt) of a user's message with pictures in it."""
    problem, images = "", []
    for part in message["content"]:
        if part["type"] == "text":
            problem += part["text"]
        else:
            data = part["image_url"]["url"].partition("base64,")[2]
            images.append(Image.open(io.BytesIO(base64.b64decode(data))))
            problem += "<image>"
    question = Question("asked", problem, tuple(images), "", ("",), "String", "Bridge")
    return question, build_prompt(policy, question, cfg)


@contextmanager
def serving(folder: Path):
    """(server, its address)."""
    server = PolicyServer(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(server.models() if folder.exists() else None)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/collective_rpc":
                assert body == {"method": "reload_weights"}
                server.load()
            chat = self.path == "/v1/chat/completions"
            self.send(server.answer(body) if chat else {})

        def send(self, answer):
            data = json.dumps(answer).encode()
            self.send_response(200 if answer is not None else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield server, f"http://127.0.0.1:{listening.server_port}/v1"
    listening.shutdown()
