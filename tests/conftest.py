"""A small real knowledge base, real questions and a small real policy, made once per session."""

import copy
import fcntl
import http.server
import json
import multiprocessing
import os
import shutil
import socket
import sys
import threading
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker per core, and the processes that it starts
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import build_kb
from atlas.articles import read_atlas
from config import PRESETS
from data import Question, load_questions
from mmhops import build
from model import load_policy
from retrieval import KnowledgeBase

ROOT = Path(__file__).parent.parent
WARMSTART = ROOT / "assets" / "tiny-warmstart"
# programs: what they import is optional
collect_ignore = ["smollm_server.py", "make_bem_fixture.py", "policy_server.py", "slow_index.py"]


# The files that take longest, first: two workers then end at about the same time. Among them, for
# the second worker, files that need no knowledge base: the first one builds it meanwhile.
LONGEST = [
    "test_scale",
    "test_index",
    "test_metrics",
    "test_data",
    "test_docs",
    "test_sweep",
    "test_imports",
    "test_rollout",
    "test_evaluate",
    "test_serving",
    "test_gpu",
    "test_build",
    "test_train",
    "test_served",
]


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


# ---------------------------------------------------------------------- knowledge base, questions


def made_once(tmp_path_factory, name: str, make) -> Path:
    """A folder that one of pytest's workers makes, while the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    folder = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a worker that dies lets go of it
        if not folder.exists():
            make(folder)  # which gives the folder its name when it is whole
    return folder


def start_forkserver(module: str):
    """Processes that multiprocessing's "forkserver" starts from now on are forked from one that has
    imported this module, which takes seconds, and has no threads: the child of a process with
    threads may wait for ever for a lock that one of them held.
    """
    multiprocessing.set_forkserver_preload([module])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def entities():
    """Forty countries, their capitals, some regions and monuments: an atlas in which every relation
    stays inside.
    """
    by_kind = {}
    for entity in copy.deepcopy(read_atlas()):
        by_kind.setdefault(entity["kind"], []).append(entity)
    # 1) Every fourth country that has two photos and neighbours, and what belongs to these.
    countries = [e for e in by_kind["country"] if len(e["photos"]) == 2 and e["borders"]]
    countries = countries[::4][:40]
    chosen = {e["id"] for e in countries}
    belongs = {"capital": "capital of", "region": "country", "monument": "country"}
    kept = list(countries)
    for kind, relation in belongs.items():
        inside = [e for e in by_kind[kind] if e["relations"][relation]["target"] in chosen]
        kept += inside if kind == "capital" else inside[:15]
    # 2) Relations that lead out of them go, and the fields of countries that nobody asks about.
    chosen = {e["id"] for e in kept}
    asked = {"Climate"}
    for country in countries:
        for fact in {**country["attributes"], **country["relations"]}.values():
            asked.add(fact["field"])
    for e in kept:
        e["relations"] = {name: r for name, r in e["relations"].items() if r["target"] in chosen}
        e["borders"] = [other for other in e["borders"] if other in chosen]
        if e["kind"] == "country":
            e["fields"] = {field: value for field, value in e["fields"].items() if field in asked}
    return kept


@pytest.fixture(scope="session")
def kb_folder(entities, tmp_path_factory):
    def make(folder):
        build_kb.build(folder, copy.deepcopy(entities), say=lambda *_: None)

    return made_once(tmp_path_factory, "kb", make)


def kb_copy(kb_folder: Path, out: Path) -> Path:
    """A copy whose texts, indexes and manifest may be changed: encoders and pictures are links."""
    linked = ("encoders", "images", "photos")
    shutil.copytree(kb_folder, out, ignore=shutil.ignore_patterns(*linked))
    for name in linked:
        (out / name).symlink_to(kb_folder / name)
    return out


@pytest.fixture(scope="session")
def kb(kb_folder):
    return KnowledgeBase.open(kb_folder)


@pytest.fixture(scope="session")
def data_folder(kb_folder, tmp_path_factory):
    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "SIZES", {"train": 200, "validation": 40, "test": 40})
            build.build(kb_folder, folder, say=lambda *_: None)

    return made_once(tmp_path_factory, "mmhops", make)


@pytest.fixture(scope="session")
def questions(data_folder):
    return load_questions(data_folder, "train")


@pytest.fixture(scope="session")
def mixed(questions):
    """Eight questions, every kind among them, two with two images."""
    chosen = []
    for steps in (2, 3, 4):
        chosen += [q for q in questions if q.split == "Bridge" and q.num_steps == steps][:2]
    return chosen + [q for q in questions if q.split == "Compare"][:2]


@pytest.fixture(scope="session")
def text_only():
    """A question without a picture."""
    problem = "What is the capital of Chad?"
    return Question("text", problem, (), "N'Djamena", ("N'Djamena",), "String", "Bridge")


# ---------------------------------------------------------------------------------------- policy


@pytest.fixture(scope="session")
def policy():
    """The warm-started tiny policy, in float32, to sample from; tests that train load their own."""
    policy = load_policy(WARMSTART, torch.float32)
    policy.model.eval()
    return policy


@pytest.fixture
def cfg():
    return copy.deepcopy(PRESETS["tiny"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------- endpoint


@pytest.fixture
def endpoint():
    """(state, address) of a chat endpoint. It counts what it was asked in state["asked"].

    A test sets what it replies: state["reply"], a function of the first message, or state["chat"],
    of the whole request; state["fail"] is how many requests fail first.
    """
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
            reply = completion(body["model"], text)
            reply["choices"] = state.get("choices", reply["choices"])
            data = json.dumps(reply).encode()
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


def completion(model: str, text: str) -> dict:
    """A chat completion, as OpenAI-compatible servers send it."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
    }
