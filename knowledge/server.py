"""Retrieval over HTTP: a server that answers as the authors' two servers do, and a client for theirs and ours.

    python -m knowledge.server --kb data/kb                                       # http://127.0.0.1:8000
    python train.py --text-url http://127.0.0.1:8000 --image-url http://127.0.0.1:8000

    POST /retrieve       {"queries": [..], "topk": 3, "return_scores": true}  →  {"result": [[{"document": {"id", "contents"}, "score"}]]}
    POST /image_search   {"image_base64": ".." or [..], "topk": 5}            →  {"mode", "results": [[title, score]], "records": [{..}]}
    GET  /health

The authors run text on port 8000 (it is also Search-R1's format) and images on 9999; ours answers both on one port.
Eight training processes can share one knowledge base this way, on this machine or another.

**Batching.** Requests that arrive while the encoder is busy wait together and are encoded as one batch.
**Trust.** The server listens on the loopback address unless told otherwise, limits what a request may hold, and opens
no file of its own machine for a client unless started with --allow-local-paths.
"""

import base64
import binascii
import io
import os
import queue
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path

from PIL import Image
from pydantic import BaseModel

from retrieval import Hit, KnowledgeBase, KnowledgeBaseError, open_image

MAX_TOPK, MAX_QUERIES, MAX_QUERY_CHARACTERS, MAX_IMAGES = 100, 2048, 10_000, 256


# ------------------------------------------------------------------------------------------------- server


class TextRequest(BaseModel):
    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


class ImageRequest(BaseModel):
    image_base64: str | list[str] | None = None
    image_paths: str | list[str] | None = None
    topk: int | None = None


class Batcher:
    """Runs `search(items, k)` in a thread of its own, on all items that are waiting at that moment."""

    def __init__(self, search):
        self.search, self.waiting, self.batches = search, queue.Queue(), 0
        threading.Thread(target=self.run, daemon=True).start()

    def __call__(self, items: list, k: int) -> list:
        future = Future()
        self.waiting.put((items, k, future))
        return future.result()

    def run(self):
        while True:
            jobs = [self.waiting.get()]
            while not self.waiting.empty() and sum(len(items) for items, *_ in jobs) < MAX_QUERIES:
                jobs.append(self.waiting.get())
            self.batches += 1
            try:
                found = iter(
                    self.search(
                        [item for items, *_ in jobs for item in items], max(k for _, k, _ in jobs)
                    )
                )
                for items, k, future in jobs:
                    future.set_result([next(found)[:k] for _ in items])
            except Exception as error:  # one bad job must not stop the server: each asker is told
                for *_, future in jobs:
                    future.done() or future.set_exception(error)


def make_app(
    kb: KnowledgeBase,
    allow_local_paths: bool = False,
    image_root: Path | None = None,
    max_image_bytes: int = 20_000_000,
):
    """The FastAPI application over an open knowledge base."""
    from fastapi import FastAPI, HTTPException

    app, texts, images = (
        FastAPI(title="MMhops retrieval"),
        Batcher(kb.text_search),
        Batcher(kb.image_search),
    )

    def refuse(reason: str):
        raise HTTPException(400, reason)

    def topk_of(request, default: int, entries: int) -> int:
        topk = default if request.topk is None else request.topk
        return (
            topk
            if 1 <= topk <= MAX_TOPK
            else refuse(f"topk must be between 1 and {min(MAX_TOPK, entries)}")
        )

    def local_image(name: str) -> Image.Image:
        if not allow_local_paths:
            refuse(
                "local image paths are disabled; send image_base64, or start the server with --allow-local-paths"
            )
        path = Path(name).expanduser().resolve()
        if image_root and not path.is_relative_to(Path(image_root).resolve()):
            refuse(f"{name} is outside --image-root")
        if not path.is_file() or path.stat().st_size > max_image_bytes:
            refuse(f"{name} is no file of at most {max_image_bytes} bytes")
        try:
            return open_image(path)
        except ValueError:
            refuse(f"{name} is not an image")

    def sent_image(data: str) -> Image.Image:
        data = data.partition(",")[2] if data.startswith("data:") else data
        if len(data) > max_image_bytes * 4 // 3 + 4:
            refuse(f"an image may have at most {max_image_bytes} bytes")
        try:
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                return image.convert("RGB")
        except (binascii.Error, OSError, ValueError, Image.DecompressionBombError) as error:
            refuse(f"image_base64 does not hold an image ({type(error).__name__})")

    @app.get("/health")
    def health():
        return {
            "status": "ok",
            "entries": len(kb.texts),
            "dimension": kb.text_index.d,
            "model": "E5",
            "image_entries": len(kb.records),
            "image_dimension": kb.image_index.d,
        }

    @app.post("/retrieve")
    def retrieve(request: TextRequest):
        if not request.queries or not all(query.strip() for query in request.queries):
            refuse("queries must hold at least one string, and no empty one")
        if (
            len(request.queries) > MAX_QUERIES
            or max(map(len, request.queries)) > MAX_QUERY_CHARACTERS
        ):
            refuse(f"at most {MAX_QUERIES} queries of {MAX_QUERY_CHARACTERS} characters a request")
        found = texts(request.queries, topk_of(request, 3, len(kb.texts)))
        documents = [
            [({"id": hit.row, "contents": kb.texts[hit.row]}, hit.score) for hit in hits]
            for hits in found
        ]
        return {
            "result": [
                [{"document": d, "score": s} if request.return_scores else d for d, s in hits]
                for hits in documents
            ]
        }

    @app.post("/image_search")
    def image_search(request: ImageRequest):
        if (request.image_base64 is None) == (request.image_paths is None):
            refuse("give either image_base64 or image_paths")
        given = request.image_paths if request.image_base64 is None else request.image_base64
        several = isinstance(given, list)
        if several and not 1 <= len(given) <= MAX_IMAGES:
            refuse(f"between 1 and {MAX_IMAGES} images a request")
        pictures = [
            (local_image if request.image_base64 is None else sent_image)(item)
            for item in (given if several else [given])
        ]
        found = images(pictures, topk_of(request, 5, len(kb.records)))
        records = [[kb.records[hit.row] | {"score": hit.score} for hit in hits] for hits in found]
        results = [[[hit.title, hit.score] for hit in hits] for hits in found]
        return {
            "mode": "batch" if several else "single",
            "results": results if several else results[0],
            "records": records if several else records[0],
        }

    return app


def serve(kb: KnowledgeBase, host: str, port: int, **options):
    """Answer until stopped."""
    import uvicorn

    uvicorn.run(make_app(kb, **options), host=host, port=port, log_level="warning")


# ------------------------------------------------------------------------------------------------- client


class RemoteKnowledgeBase:
    """`KnowledgeBase` over HTTP. tries: attempts a request, each waiting twice as long as the one before (six take half a
    minute; the environment variable MMHOPS_SERVER_TRIES sets another number).

    Raises KnowledgeBaseError when a server refuses a request, or has not answered after all tries.
    """

    def __init__(
        self,
        text_url: str,
        image_url: str,
        tries: int = int(os.environ.get("MMHOPS_SERVER_TRIES", 6)),
        wait: float = 1.0,
        timeout: float = 120.0,
        cache_size: int = 20_000,
    ):
        import requests

        self.session, self.text_url, self.image_url = (
            requests.Session(),
            text_url.rstrip("/"),
            image_url.rstrip("/"),
        )
        self.tries, self.wait, self.timeout, self.cache_size, self.cache = (
            tries,
            wait,
            timeout,
            cache_size,
            OrderedDict(),
        )
        self.seconds = 0.0
        text, image = (
            self.call("GET", self.text_url + "/health"),
            self.call("GET", self.image_url + "/health"),
        )
        self.sizes = text.get("entries", 0), image.get("image_entries", image.get("entries", 0))

    def call(self, method: str, url: str, body: dict | None = None) -> dict:
        from requests import RequestException

        for attempt in range(self.tries):
            try:
                response = self.session.request(method, url, json=body, timeout=self.timeout)
                if response.status_code < 500:
                    break
                reason = f"status {response.status_code}"
            except RequestException as error:
                reason = type(error).__name__
            if attempt + 1 < self.tries:
                time.sleep(self.wait * 2**attempt)
        else:
            raise KnowledgeBaseError(
                f"the retrieval server at {url} does not answer ({reason}, {self.tries} tries); start it again, "
                f"then go on with --resume"
            )
        if response.status_code != 200:
            raise KnowledgeBaseError(
                f"the retrieval server at {url} refused a request: {response.text[:300]}"
            )
        return response.json()

    def ask_once(self, keys: list, items: list, ask, size: int) -> list:
        """Answers in the items' order; only those not remembered are asked for, `size` a request."""
        started = time.perf_counter()
        new = list({key: item for key, item in zip(keys, items) if key not in self.cache}.items())
        for start in range(0, len(new), size):
            names, wanted = zip(*new[start : start + size])
            self.cache.update(zip(names, ask(wanted)))
        answers = [self.cache[key] for key in keys]
        while len(self.cache) > self.cache_size:
            self.cache.popitem(last=False)
        self.seconds += time.perf_counter() - started
        return answers

    def text_search(self, queries: list[str], k: int = 3) -> list[list[Hit]]:
        def ask(new):
            found = self.call(
                "POST",
                self.text_url + "/retrieve",
                {"queries": new, "topk": k, "return_scores": True},
            )["result"]
            return [
                [
                    Hit(
                        *h["document"]["contents"].partition("\n")[::2],
                        h["score"],
                        int(h["document"]["id"]),
                    )
                    for h in hits
                ]
                for hits in found
            ]

        return self.ask_once([("text", query, k) for query in queries], queries, ask, 256)

    def image_search(self, images: list, k: int = 1) -> list[list[Hit]]:
        def ask(new):
            sent = [base64.b64encode(Path(image).read_bytes()).decode() for image in new]
            found = self.call(
                "POST", self.image_url + "/image_search", {"image_base64": sent, "topk": k}
            )["records"]
            return [[Hit(h["title"], "", h["score"], int(h["id"])) for h in hits] for hits in found]

        return self.ask_once([("image", str(image), k) for image in images], images, ask, 32)


def connect(kb: Path, text_url: str = "", image_url: str = "", device: str = "cpu"):
    """The knowledge base of a folder, or of the servers where their addresses are given."""
    if not text_url and not image_url:
        return KnowledgeBase.open(kb, device)
    if not text_url or not image_url:
        raise KnowledgeBaseError(
            "give both --text-url and --image-url; they may be the same address"
        )
    return RemoteKnowledgeBase(text_url, image_url)
