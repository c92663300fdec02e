"""A real server process: the authors' formats, its limits, training against it, and its death."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import requests
from conftest import ROOT
from PIL import Image

from build_kb import write_index
from files.records import write_jsonl
from knowledge.client import RemoteKnowledgeBase
from knowledge.server import Batcher
from retrieval import TEXT_CORPUS, TEXT_INDEX, KnowledgeBaseError


def start(kb_folder, *flags):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "knowledge.server",
            "--kb",
            str(kb_folder),
            "--port",
            str(port),
            *map(str, flags),
        ],
        cwd=ROOT,
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            requests.get(url + "/health", timeout=1)
            return process, url
        except requests.RequestException:
            assert process.poll() is None, "the server ended"
            time.sleep(0.25)
    process.kill()
    raise TimeoutError


@pytest.fixture(scope="module")
def server(kb_folder):
    process, url = start(kb_folder)
    yield url
    process.kill()


def without_scores(found):
    return [[(hit.title, hit.text, hit.row) for hit in hits] for hits in found]


def scores(found):
    return [hit.score for hits in found for hit in hits]


def test_the_client_finds_what_the_folder_finds(server, kb, questions):
    remote = RemoteKnowledgeBase(server, server)
    queries = ["capital of Austria", "coastline of Chad", "capital of Austria"]
    images = [image for q in questions[:5] for image in q.images]
    assert remote.sizes == kb.sizes
    for mine, theirs in (
        (remote.text_search(queries, 3), kb.text_search(queries, 3)),
        (remote.image_search(images, 2), kb.image_search(images, 2)),
    ):
        assert without_scores(mine) == without_scores(theirs)
        assert scores(mine) == pytest.approx(scores(theirs), abs=1e-5)


def part_of(kb, kb_folder, folder, rows: range):
    """A knowledge base with some of the passages."""
    shutil.copytree(kb_folder, folder)
    vectors = kb.text_index.reconstruct_n(rows.start, len(rows))  # (n, d)
    write_index(folder / TEXT_INDEX, vectors)
    records = ({"id": i, "contents": kb.texts[row]} for i, row in enumerate(rows))
    write_jsonl(folder / TEXT_CORPUS, records)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    return folder


def test_two_servers_with_half_of_the_passages_each_are_one(kb, kb_folder, tmp_path):
    half = len(kb.texts) // 2
    parts = [range(half), range(half, len(kb.texts))]
    folders = [part_of(kb, kb_folder, tmp_path / str(i), rows) for i, rows in enumerate(parts)]
    servers = [start(folder) for folder in folders]
    try:
        urls = [url for _, url in servers]
        remote = RemoteKnowledgeBase(",".join(urls), urls[0])
        assert remote.sizes == kb.sizes
        queries = [f"capital of {record['title']}" for record in list(kb.records)[:20]]
        mine, theirs = remote.text_search(queries, 3), kb.text_search(queries, 3)
        assert without_scores(mine) == without_scores(theirs)
        assert scores(mine) == pytest.approx(scores(theirs), abs=1e-5)
        assert {hit.row < half for hits in mine for hit in hits} == {True, False}
    finally:
        for process, _ in servers:
            process.kill()


def test_the_client_takes_pil_images_and_asks_for_equal_ones_once(server, kb, questions):
    remote = RemoteKnowledgeBase(server, server)
    path = questions[0].images[0]
    mine = remote.image_search([Image.open(path), path], 2)
    theirs = kb.image_search([Image.open(path), path], 2)
    assert without_scores(mine) == without_scores(theirs)
    assert scores(mine) == pytest.approx(scores(theirs), abs=1e-5)
    remote.image_url = "http://127.0.0.1:9"  # nobody there: what was asked is remembered
    assert remote.image_search([Image.open(path), str(path)], 2) == mine


def test_the_authors_formats(server, kb, questions):
    def post(path, **body):
        return requests.post(server + path, json=body).json()

    answer = post("/retrieve", queries=["capital of Chad"], topk=2, return_scores=True)
    assert set(answer) == {"result"}
    assert len(answer["result"][0]) == 2
    best = answer["result"][0][0]
    assert set(best) == {"document", "score"}
    assert best["document"]["contents"] == kb.texts[best["document"]["id"]]

    plain = post("/retrieve", queries=["capital of Chad"])["result"][0]
    assert len(plain) == 3
    assert set(plain[0]) == {"id", "contents"}

    data = base64.b64encode(questions[0].images[0].read_bytes()).decode()
    single = post("/image_search", image_base64="data:image/png;base64," + data)
    assert single["mode"] == "single"
    assert len(single["results"]) == 5
    best = single["records"][0]
    assert set(best) == {"id", "title", "entity_id", "image_path", "score"}
    assert single["results"][0] == [best["title"], best["score"]]

    batch = post("/image_search", image_base64=[data, data], topk=1)
    assert batch["mode"] == "batch"
    assert [len(r) for r in batch["records"]] == [1, 1]
    assert batch["records"][0][0]["title"] == best["title"]


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("/retrieve", {"queries": []}, 400),
        ("/retrieve", {"queries": [" "]}, 400),
        ("/retrieve", {"queries": ["x"], "topk": 0}, 400),
        ("/retrieve", {"queries": ["x"], "topk": 101}, 400),
        ("/retrieve", {"queries": ["x"] * 5000}, 400),
        ("/retrieve", {"queries": ["x" * 20_000]}, 400),
        ("/retrieve", {"nothing": 1}, 422),
        ("/image_search", {}, 400),
        ("/image_search", {"image_base64": "###"}, 400),
        ("/image_search", {"image_base64": []}, 400),
        ("/image_search", {"image_base64": base64.b64encode(b"no image").decode()}, 400),
        ("/image_search", {"image_paths": "/etc/passwd"}, 400),
        ("/image_search", {"image_base64": "A" * 40_000_000}, 400),
    ],
)
def test_bad_requests_are_refused_and_the_server_lives_on(server, path, body, status):
    assert requests.post(server + path, json=body).status_code == status
    assert requests.get(server + "/health").json()["status"] == "ok"


def test_local_paths_when_allowed_stay_under_the_root(kb_folder, questions):
    image = questions[0].images[0]
    process, url = start(kb_folder, "--allow-local-paths", "--image-root", image.parent)

    def status(path):
        return requests.post(url + "/image_search", json={"image_paths": str(path)}).status_code

    try:
        assert status(image) == 200
        assert status(image.parent / ".." / ".." / "x.png") == 400
    finally:
        process.kill()


def test_concurrent_requests_are_batched():
    sizes = []
    first = threading.Event()

    def search(items, k):
        sizes.append(len(items))
        first.wait(5)  # the first batch is slow; the others gather meanwhile
        return [[item] * k for item in items]

    batcher = Batcher(search)
    answers = {}

    def ask(i):
        answers[i] = batcher([i], 1 + i % 2)

    threads = [threading.Thread(target=ask, args=[i]) for i in range(20)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    first.set()
    for thread in threads:
        thread.join()
    assert answers == {i: [[i] * (1 + i % 2)] for i in range(20)}
    assert len(sizes) == 2
    assert sum(sizes) == 20


def test_a_dead_server_is_one_clear_error():
    with pytest.raises(KnowledgeBaseError, match="127.0.0.1:9/health does not answer .*2 tries"):
        RemoteKnowledgeBase("http://127.0.0.1:9", "http://127.0.0.1:9", tries=2, wait=0.01)


def test_training_against_a_server_that_dies(kb_folder, data_folder, tmp_path):
    out = tmp_path / "run"

    def command(url, steps):
        servers = f"--text-url {url} --image-url {url}".split()
        folders = ["--data", str(data_folder), "--out", str(out)]
        sizes = "--questions-per-step 4 --eval-questions 4 --eval-every 100 --save-every 100"
        rest = ["--resume", "--steps", str(steps)]
        return [sys.executable, "train.py", *servers, *folders, *sizes.split(), *rest]

    def records():
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if "reward_mean" in record]

    process, url = start(kb_folder)
    training = subprocess.Popen(
        command(url, 1000),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"MMHOPS_SERVER_TRIES": "2"},
    )
    try:
        while len(records()) < 2:
            assert training.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, errors = training.communicate(timeout=120)
        assert training.returncode != 0
        assert re.search(r"error: the retrieval server at .* does not answer", errors)
        assert "Traceback" not in errors
    finally:
        training.kill()
        process.kill()
    done = records()[-1]["step"]
    # Every finished step is in the checkpoint.
    assert (out / "latest").resolve().name == f"step-{done:06d}"
    process, url = start(kb_folder)
    try:
        subprocess.run(command(url, done + 1), cwd=ROOT, check=True, capture_output=True)
    finally:
        process.kill()
    assert [r["step"] for r in records()] == list(range(1, done + 2))
