"""A real server process: the authors' formats, its limits, training against it, and its death."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import requests
from conftest import ROOT

from knowledge.client import RemoteKnowledgeBase
from knowledge.server import Batcher
from retrieval import KnowledgeBaseError


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


def test_the_client_finds_what_the_folder_finds(server, kb, questions):
    remote = RemoteKnowledgeBase(server, server)
    queries, images = (
        ["capital of Austria", "coastline of Chad", "capital of Austria"],
        [image for q in questions[:5] for image in q.images],
    )
    assert remote.sizes == kb.sizes
    for mine, theirs in (
        (remote.text_search(queries, 3), kb.text_search(queries, 3)),
        (remote.image_search(images, 2), kb.image_search(images, 2)),
    ):
        assert [[(h.title, h.text, h.row) for h in hits] for hits in mine] == [
            [(h.title, h.text, h.row) for h in hits] for hits in theirs
        ]
        assert [[h.score for h in hits] for hits in mine] == [
            pytest.approx([h.score for h in hits], abs=1e-5) for hits in theirs
        ]


def test_the_authors_formats(server, kb, questions):
    answer = requests.post(
        server + "/retrieve",
        json={"queries": ["capital of Chad"], "topk": 2, "return_scores": True},
    ).json()
    assert (
        set(answer) == {"result"}
        and len(answer["result"][0]) == 2
        and set(answer["result"][0][0]) == {"document", "score"}
    )
    assert (
        answer["result"][0][0]["document"]["contents"]
        == kb.texts[answer["result"][0][0]["document"]["id"]]
    )
    plain = requests.post(server + "/retrieve", json={"queries": ["capital of Chad"]}).json()[
        "result"
    ][0]
    assert len(plain) == 3 and set(plain[0]) == {"id", "contents"}
    data = base64.b64encode(questions[0].images[0].read_bytes()).decode()
    single = requests.post(
        server + "/image_search", json={"image_base64": "data:image/png;base64," + data}
    ).json()
    assert (
        single["mode"] == "single"
        and len(single["results"]) == 5
        and set(single["records"][0]) == {"id", "title", "entity_id", "image_path", "score"}
    )
    assert single["results"][0] == [single["records"][0]["title"], single["records"][0]["score"]]
    batch = requests.post(
        server + "/image_search", json={"image_base64": [data, data], "topk": 1}
    ).json()
    assert (
        batch["mode"] == "batch"
        and [len(r) for r in batch["records"]] == [1, 1]
        and batch["records"][0][0]["title"] == single["records"][0]["title"]
    )


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
    try:
        assert (
            requests.post(url + "/image_search", json={"image_paths": str(image)}).status_code
            == 200
        )
        assert (
            requests.post(
                url + "/image_search",
                json={"image_paths": str(image.parent / ".." / ".." / "x.png")},
            ).status_code
            == 400
        )
    finally:
        process.kill()


def test_concurrent_requests_are_batched():
    sizes, first = [], threading.Event()

    def search(items, k):
        sizes.append(len(items))
        first.wait(5)  # the first batch is slow; the others gather meanwhile
        return [[item] * k for item in items]

    batcher, answers = Batcher(search), {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: batcher([i], 1 + i % 2)}))
        for i in range(20)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    first.set()
    for thread in threads:
        thread.join()
    assert (
        answers == {i: [[i] * (1 + i % 2)] for i in range(20)}
        and len(sizes) == 2
        and sum(sizes) == 20
    )


def test_a_dead_server_is_one_clear_error():
    with pytest.raises(KnowledgeBaseError, match="127.0.0.1:9/health does not answer .*2 tries"):
        RemoteKnowledgeBase("http://127.0.0.1:9", "http://127.0.0.1:9", tries=2, wait=0.01)


def test_training_against_a_server_that_dies(kb_folder, data_folder, tmp_path):
    process, url = start(kb_folder)
    command = [
        sys.executable,
        "train.py",
        "--text-url",
        url,
        "--image-url",
        url,
        "--data",
        data_folder,
        "--out",
        tmp_path / "run",
        "--questions-per-step",
        "4",
        "--eval-questions",
        "4",
        "--eval-every",
        "100",
        "--save-every",
        "100",
        "--resume",
    ]

    def records():
        path = tmp_path / "run" / "metrics.jsonl"
        return (
            [r for r in map(json.loads, path.read_text().splitlines()) if "reward_mean" in r]
            if path.exists()
            else []
        )

    environment = os.environ | {"MMHOPS_SERVER_TRIES": "2"}
    training = subprocess.Popen(
        [*map(str, command), "--steps", "1000"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        while len(records()) < 2:
            assert training.poll() is None and time.sleep(0.2) is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, errors = training.communicate(timeout=120)
        assert (
            training.returncode != 0
            and re.search(r"error: the retrieval server at .* does not answer", errors)
            and "Traceback" not in errors
        )
    finally:
        training.kill()
        process.kill()
    done = records()[-1]["step"]
    assert (
        tmp_path / "run" / "latest"
    ).resolve().name == f"step-{done:06d}"  # every finished step is in the checkpoint
    process, url = start(kb_folder)
    try:
        command[3], command[5] = url, url
        subprocess.run(
            [*map(str, command), "--steps", str(done + 1)],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
    finally:
        process.kill()
    assert [r["step"] for r in records()] == list(range(1, done + 2))
