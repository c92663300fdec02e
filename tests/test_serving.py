"""A real server process: the authors' formats, its limits, training against it, and its death."""

import asyncio
import base64
import io
import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import requests
import uvicorn
from conftest import ROOT, free_port
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from build_kb import write_index
from config import PRESETS
from files.records import write_jsonl
from knowledge import client
from knowledge.batcher import ITEMS, Batcher
from knowledge.client import RemoteKnowledgeBase
from knowledge.server import MAX_BODY, BodyLimit, make_app
from retrieval import TEXT_CORPUS, TEXT_INDEX, KnowledgeBase, KnowledgeBaseError
from train import train


def start(kb_folder, *flags):
    port = free_port()
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
    for _ in range(2400):
        try:
            requests.get(url + "/health", timeout=1)
            return process, url
        except requests.RequestException:
            assert process.poll() is None, "the server ended"
            time.sleep(0.25)
    process.kill()
    raise TimeoutError


@contextmanager
def serving(kb, **options):
    """The address of a server of ours, in a thread of this process."""
    config = uvicorn.Config(make_app(kb, **options), port=0, log_level="warning")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def server(kb_folder):
    with serving(KnowledgeBase.open(kb_folder)) as url:
        yield url


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
    with ExitStack() as stack:
        halves = [KnowledgeBase.open(folder) for folder in folders]
        urls = [stack.enter_context(serving(half)) for half in halves]
        remote = RemoteKnowledgeBase(",".join(urls), urls[0])
        assert remote.sizes == kb.sizes
        queries = [f"capital of {record['title']}" for record in list(kb.records)[:20]]
        mine, theirs = remote.text_search(queries, 3), kb.text_search(queries, 3)
        assert without_scores(mine) == without_scores(theirs)
        assert scores(mine) == pytest.approx(scores(theirs), abs=1e-5)
        assert {hit.row < half for hits in mine for hit in hits} == {True, False}


def test_the_client_takes_pil_images_and_asks_for_equal_ones_once(server, kb, questions):
    remote = RemoteKnowledgeBase(server, server)
    path = questions[0].images[0]
    mine = remote.image_search([Image.open(path), path], 2)
    theirs = kb.image_search([Image.open(path), path], 2)
    assert without_scores(mine) == without_scores(theirs)
    assert scores(mine) == pytest.approx(scores(theirs), abs=1e-5)
    remote.image_url = "http://127.0.0.1:9"  # nobody there: what was asked is remembered
    assert remote.image_search([Image.open(path), str(path)], 2) == mine


def test_what_a_request_cannot_hold_is_sent_in_several_or_made_smaller(
    server, kb, monkeypatch, tmp_path
):
    """Whatever is asked, the client's requests are such that the server takes them."""
    noise = np.random.default_rng(0).integers(0, 255, (90, 60, 3), np.uint8)
    images = [Image.fromarray(np.roll(noise, turn, 0)) for turn in range(4)]
    monkeypatch.setattr(client, "REQUEST_PIXELS", 2 * 90 * 60)
    assert [len(part) for part in client.image_requests(images)] == [2, 2]
    monkeypatch.setattr(client, "REQUEST_BYTES", 1)
    assert [len(part) for part in client.image_requests(images)] == [1, 1, 1, 1]
    remote = RemoteKnowledgeBase(server, server)
    assert without_scores(remote.image_search(images)) == without_scores(kb.image_search(images))

    monkeypatch.setattr(client, "MOST_IMAGE_BYTES", 1000)
    monkeypatch.setattr(client, "SIDE", 30)
    data, pixels = client.sendable(images[0])
    assert Image.open(io.BytesIO(data)).size == (20, 30)
    assert pixels == 600
    images[0].save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match="torn.png"):  # its header says nothing of it
        client.sendable(tmp_path / "torn.png")

    (hits,) = remote.text_search(["capital of Chad " + "= " * 10_000])
    assert len(hits) == 3


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
        ("/retrieve", {"queries": ["x" * 9_000] * 200}, 400),
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


def test_local_paths_when_allowed_stay_under_the_root(kb, tmp_path):
    """What lies outside is refused, though it is a picture, and however it is named."""
    for folder in ("inside", "outside"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / folder / "x.png")
    (tmp_path / "inside" / "link.png").symlink_to(tmp_path / "outside" / "x.png")
    root = tmp_path / "inside"
    with serving(kb, allow_local_paths=True, image_root=root) as url:

        def status(path):
            return requests.post(url + "/image_search", json={"image_paths": str(path)}).status_code

        assert status(root / "x.png") == 200
        assert status(tmp_path / "outside" / "x.png") == 400
        assert status(root / ".." / "outside" / "x.png") == 400
        assert status(root / "link.png") == 400


def test_concurrent_requests_are_batched():
    sizes = []
    first = threading.Event()

    def search(items, k):
        sizes.append(len(items))
        first.wait(60)  # the first batch is slow; the others gather meanwhile
        return [[item] * k for item in items]

    batcher = Batcher(search)
    futures = [batcher.submit([i], 1 + i % 2) for i in range(20)]
    first.set()
    assert [future.result(60) for future in futures] == [[[i] * (1 + i % 2)] for i in range(20)]
    assert len(sizes) <= 3
    assert sum(sizes) == 20


def gathering(search):
    """A batcher whose first batch lasts until `go` is set: what is asked meanwhile waits."""
    go = threading.Event()

    def slow(items, k):
        go.wait(60)
        return search(items, k)

    batcher = Batcher(slow, cost=lambda item: 1, budget=ITEMS)
    batcher.submit([0], 1)
    while not batcher.batches:
        time.sleep(0.01)
    return batcher, go


def test_a_small_request_does_not_wait_for_long_ones():
    batches = []

    def search(items, k):
        batches.append(items)
        return [[item] for item in items]

    batcher, go = gathering(search)
    long = [batcher.submit([f"{i}.{j}" for j in range(200)], 1) for i in range(48)]
    small = batcher.submit(["small"], 1)
    go.set()
    assert small.result(60) == [["small"]]
    assert [future.result(60)[-1] for future in long] == [[f"{i}.199"] for i in range(48)]
    assert "small" in batches[1]  # the first that began after it had come
    assert max(map(len, batches)) <= ITEMS


def test_a_costly_item_has_a_batch_of_its_own():
    sizes = []

    def search(items, k):
        sizes.append(len(items))
        return [[item] for item in items]

    batcher = Batcher(search, cost=lambda item: item, budget=10)
    assert batcher.submit([50, 1, 1, 50, 9, 2], 1).result(60) == [[50], [1], [1], [50], [9], [2]]
    assert sizes == [1, 2, 1, 1, 1]


def test_jobs_take_turns_also_where_a_batch_has_no_room_for_all():
    """Twelve costly jobs of three items, then a small one: its turn comes with theirs."""
    done = []

    def search(items, k):
        done.extend(items)
        return [[item] for item in items]

    batcher = Batcher(search, cost=lambda item: 0 if item == "small" else 1, budget=5)
    go = threading.Event()
    batcher.search = lambda items, k: (go.wait(60), search(items, k))[1]
    batcher.submit(["first"], 1)
    while not batcher.batches:
        time.sleep(0.01)
    costly = [batcher.submit([f"{i}.{j}" for j in range(3)], 1) for i in range(12)]
    small = batcher.submit(["small"], 1)
    go.set()
    assert small.result(60) == [["small"]]
    assert [len(future.result(60)) for future in costly] == [3] * 12
    assert done.index("small") <= 13 + 5  # all of them once, and what was in its batch


def test_an_item_whose_cost_cannot_be_told_is_refused_and_harms_no_other():
    batcher = Batcher(lambda items, k: [[item] for item in items], cost=lambda item: 1 / item)
    with pytest.raises(ZeroDivisionError):
        batcher.submit([1, 0], 1)
    assert batcher.submit([2], 1).result(60) == [[2]]


def test_a_request_that_cannot_be_answered_harms_no_other():
    def search(items, k):
        if "bad" in items:
            raise ValueError("bad")
        return [[item] for item in items]

    batcher, go = gathering(search)
    futures = [batcher.submit(items, 1) for items in (["a"], ["b", "bad"], ["c"])]
    go.set()
    assert futures[0].result(60) == [["a"]]
    assert futures[2].result(60) == [["c"]]
    with pytest.raises(ValueError, match="bad"):
        futures[1].result(60)


def test_nothing_is_searched_for_a_request_that_was_given_up():
    searched = []

    def search(items, k):
        searched.extend(items)
        return [[item] for item in items]

    batcher, go = gathering(search)
    given_up, kept = batcher.submit(["gone"], 1), batcher.submit(["kept"], 1)
    assert given_up.cancel()
    go.set()
    assert kept.result(60) == [["kept"]]
    assert "gone" not in searched


def test_texts_and_pictures_can_be_asked_for_at_once(kb, questions):
    small = KnowledgeBase(
        kb.texts,
        kb.text_index,
        kb.text_encoder,
        kb.records,
        kb.image_index,
        kb.image_encoder,
        cache_size=1,
    )
    images = [image for question in questions[:8] for image in question.images]
    faults = []

    def ask(search, items):
        try:
            for item in items * 5:
                search([item], 1)
        except Exception as error:
            faults.append(error)

    threads = [
        threading.Thread(target=ask, args=[small.text_search, [f"area {i}" for i in range(20)]]),
        threading.Thread(target=ask, args=[small.image_search, images]),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def bomb(side):
    """A small file of many pixels, in base64."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_pictures_are_counted_before_they_are_decoded(server, monkeypatch):
    def load(image):
        pytest.fail("a picture is decoded")

    monkeypatch.setattr(PngImageFile, "load", load)
    two = [bomb(8000)] * 2
    assert sum(map(len, two)) < 100_000
    answer = requests.post(server + "/image_search", json={"image_base64": two})
    assert answer.status_code == 400
    assert "128000000" in answer.json()["detail"]


def test_only_known_kinds_of_pictures_are_opened(server):
    drawing = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()
    answer = requests.post(server + "/image_search", json={"image_base64": drawing})
    assert answer.status_code == 400
    assert "does not hold an image" in answer.json()["detail"]


def test_a_body_is_refused_before_it_is_parsed(server):
    many = b'{"queries": ["' + b"x" * (MAX_BODY + 1) + b'"]}'
    with suppress(requests.ConnectionError):  # it closes while the client is still sending
        assert requests.post(server + "/retrieve", data=many).status_code == 413
    deep = b"[" * 100_000
    assert requests.post(server + "/retrieve", data=deep).status_code in (400, 422)
    assert requests.get(server + "/health").json()["status"] == "ok"


async def statuses_of(messages, headers=()):
    """What BodyLimit answers to these messages of a client that then is silent."""
    sent = []

    async def application(scope, receive, send):
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "length": len(body)})

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message):
        sent.append(message.get("status"))

    limited = BodyLimit(application)
    await limited({"type": "http", "headers": list(headers)}, receive, send)
    assert limited.held == 0
    return sent[0]


def piece(body, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.parametrize(
    "messages, headers, status",
    [
        ([piece(b"a"), piece(b"b", more=False)], [], 200),
        ([], [(b"content-length", b"99999999999")], 413),
        ([], [(b"content-length", b"-1")], 413),
        ([piece(b"x" * MAX_BODY), piece(b"x", more=False)], [], 413),  # sent without a length
        ([piece(b"a")], [], 408),  # the rest never comes
    ],
)
def test_a_body_is_whole_small_and_in_time(messages, headers, status, monkeypatch):
    seconds = 0.2 if status == 408 else 60
    monkeypatch.setattr("knowledge.server.SECONDS_TO_SEND", seconds)
    assert asyncio.run(statuses_of(messages, headers)) == status


def test_a_dead_server_is_one_clear_error():
    with pytest.raises(KnowledgeBaseError, match="127.0.0.1:9/health does not answer .*2 tries"):
        RemoteKnowledgeBase("http://127.0.0.1:9", "http://127.0.0.1:9", tries=2, wait=0.01)


def test_training_against_a_server_that_dies(kb_folder, data_folder, tmp_path, monkeypatch):
    out = tmp_path / "run"

    sizes = {"questions_per_step": 2, "group_size": 4, "eval_questions": 4, "save_every": 100}
    settings = sizes | {"eval_every": 100, "data": data_folder, "out": out}

    def records():
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if "reward_mean" in record]

    process, url = start(kb_folder)

    def kill_after_a_step():
        while not records():
            time.sleep(0.2)
        process.kill()

    killer = threading.Thread(target=kill_after_a_step, daemon=True)
    killer.start()
    patient = partial(RemoteKnowledgeBase, tries=2, wait=0.1)
    monkeypatch.setattr(client, "RemoteKnowledgeBase", patient)
    cfg = replace(PRESETS["tiny"], text_url=url, image_url=url, steps=1000, **settings)
    try:
        with pytest.raises(KnowledgeBaseError, match="the retrieval server at .* does not answer"):
            train(cfg)
    finally:
        process.kill()
    killer.join()
    done = records()[-1]["step"]
    # Every finished step is in the checkpoint.
    assert (out / "latest").resolve().name == f"step-{done:06d}"
    with serving(KnowledgeBase.open(kb_folder)) as url:
        cfg = replace(PRESETS["tiny"], text_url=url, image_url=url, resume=True, **settings)
        train(replace(cfg, steps=done + 1))
    assert [r["step"] for r in records()] == list(range(1, done + 2))
