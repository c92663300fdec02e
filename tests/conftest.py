"""A small real knowledge base, real questions and a small real policy, made once a session."""

import copy
import http.server
import json
import os
import threading
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch

import build_kb
from data import load_questions
from mmhops import build
from model import load_policy
from retrieval import KnowledgeBase
from train import PRESETS

ROOT = Path(__file__).parent.parent
WARMSTART = ROOT / "assets" / "tiny-warmstart"
collect_ignore = [
    "smollm_server.py",
    "make_bem_fixture.py",
]  # programs: what they import is optional


@pytest.fixture(scope="session")
def entities():
    """Forty countries, their capitals, some regions and monuments: an atlas in which every relation stays inside."""
    from atlas.articles import read_atlas

    everything = copy.deepcopy(read_atlas())
    countries = [
        e for e in everything if e["kind"] == "country" and len(e["photos"]) == 2 and e["borders"]
    ][::4][:40]
    inside = {e["id"] for e in countries}
    kept = countries + [
        e
        for e in everything
        if e["kind"] == "capital" and e["relations"]["capital of"]["target"] in inside
    ]
    for kind in ("region", "monument"):
        kept += [
            e
            for e in everything
            if e["kind"] == kind and e["relations"]["country"]["target"] in inside
        ][:15]
    inside = {e["id"] for e in kept}
    asked = {
        a["field"] for e in countries for a in {**e["attributes"], **e["relations"]}.values()
    } | {"Background", "Climate"}
    for e in kept:
        e["relations"] = {name: r for name, r in e["relations"].items() if r["target"] in inside}
        e["borders"] = [other for other in e["borders"] if other in inside]
        if e["kind"] == "country":
            e["fields"] = {field: value for field, value in e["fields"].items() if field in asked}
    return kept


@pytest.fixture(scope="session")
def kb_folder(entities, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kb") / "kb"
    build_kb.build(folder, copy.deepcopy(entities), say=lambda *_: None)
    return folder


@pytest.fixture(scope="session")
def kb(kb_folder):
    return KnowledgeBase.open(kb_folder)


@pytest.fixture(scope="session")
def data_folder(kb_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "mmhops"
    sizes = build.SIZES
    build.SIZES = {"train": 200, "validation": 40, "test": 40}
    try:
        build.build(kb_folder, folder, say=lambda *_: None)
    finally:
        build.SIZES = sizes
    return folder


@pytest.fixture(scope="session")
def questions(data_folder):
    return load_questions(data_folder, "train")


@pytest.fixture(scope="session")
def mixed(questions):
    """Eight questions, every kind among them, two with two images."""
    bridge = [[q for q in questions if q.split == "Bridge" and q.num_steps == n] for n in (2, 3, 4)]
    return [q for group in bridge for q in group[:2]] + [
        q for q in questions if q.split == "Compare"
    ][:2]


@pytest.fixture(scope="session")
def policy():
    """(model, processor) of the warm-started tiny policy, in float32."""
    model, processor = load_policy(WARMSTART, torch.float32)
    return model.eval(), processor


@pytest.fixture
def cfg():
    return copy.deepcopy(PRESETS["tiny"])


@pytest.fixture
def endpoint():
    """A chat endpoint whose replies are a function the test sets, of the first message or of all; it counts what it was asked."""
    state = {"reply": lambda prompt: "", "chat": None, "asked": Counter(), "fail": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            state["asked"][str(prompt)] += 1
            if state["fail"]:
                state["fail"] -= 1
                self.send_response(503)
                self.end_headers()
                return
            text = state["chat"](body) if state["chat"] else state["reply"](prompt)
            answer = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": text},
                    }
                ],
            }
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
