"""Retrieval over HTTP, as the authors' two servers answer (text on port 8000, images on 9999).

    python -m knowledge.server --kb data/kb                     # both on http://127.0.0.1:8000

    POST /retrieve       {"queries": [..], "topk": 3, "return_scores": true}   (also Search-R1's)
                       → {"result": [[{"document": {"id", "contents"}, "score"}]]}
    POST /image_search   {"image_base64": ".." or [..], "topk": 5}
                       → {"mode", "results": [[title, score]], "records": [{..}]}
    GET  /health

Eight training processes can share one knowledge base this way, on this machine or another.
"""

import base64
import binascii
import io
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pydantic import BaseModel

from files.images import open_image
from files.terminal import fail
from retrieval import KnowledgeBase, KnowledgeBaseError

# What a request may hold.
MAX_TOPK = 100
MAX_QUERIES = 2048
MAX_QUERY_CHARACTERS = 10_000
MAX_IMAGES = 256


class TextRequest(BaseModel):
    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


class ImageRequest(BaseModel):
    image_base64: str | list[str] | None = None
    image_paths: str | list[str] | None = None
    topk: int | None = None


class Batcher:
    """Runs `search(items, k)` in a thread of its own, on all items that wait at that moment.

    Requests that arrive while the encoder is busy wait together and are encoded as one batch.
    """

    def __init__(self, search):
        self.search = search
        self.waiting = queue.Queue()
        self.batches = 0
        threading.Thread(target=self.run, daemon=True).start()

    def __call__(self, items: list, k: int) -> list:
        """The k first answers of each item; returns when they are there."""
        future = Future()
        self.waiting.put((items, k, future))
        return future.result()

    def run(self):
        while True:
            # 1) Wait for a job, then take the others that wait.
            jobs = [self.waiting.get()]
            while not self.waiting.empty() and sum(len(items) for items, *_ in jobs) < MAX_QUERIES:
                jobs.append(self.waiting.get())
            self.batches += 1
            try:
                # 2) Search for all items at once, as deep as the most demanding job asks.
                everything = [item for items, _, _ in jobs for item in items]
                found = iter(self.search(everything, max(k for _, k, _ in jobs)))
                # 3) Every job gets its own answers.
                for items, k, future in jobs:
                    future.set_result([next(found)[:k] for _ in items])
            except Exception as error:  # a bad job must not stop the server: each asker is told
                for _, _, future in jobs:
                    if not future.done():
                        future.set_exception(error)


def make_app(
    kb: KnowledgeBase,
    allow_local_paths: bool = False,
    image_root: Path | None = None,
    max_image_bytes: int = 20_000_000,
):
    """The FastAPI application over an open knowledge base.

    It opens no file of its own machine for a client unless allow_local_paths, and then only under
    image_root where that is given.
    """
    from fastapi import FastAPI, HTTPException

    app = FastAPI(title="MMhops retrieval")
    search_texts = Batcher(kb.text_search)
    search_images = Batcher(kb.image_search)

    def refuse(reason: str):
        raise HTTPException(400, reason)

    def topk_of(request, default: int, entries: int) -> int:
        topk = default if request.topk is None else request.topk
        if not 1 <= topk <= MAX_TOPK:
            refuse(f"topk must be between 1 and {min(MAX_TOPK, entries)}")
        return topk

    def local_image(name: str) -> Image.Image:
        if not allow_local_paths:
            refuse(
                "local image paths are disabled; "
                "send image_base64, or start the server with --allow-local-paths"
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
        if data.startswith("data:"):  # data:image/png;base64,…
            data = data.partition(",")[2]
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
        queries = request.queries
        if not queries or not all(query.strip() for query in queries):
            refuse("queries must hold at least one string, and no empty one")
        if len(queries) > MAX_QUERIES or max(map(len, queries)) > MAX_QUERY_CHARACTERS:
            refuse(
                f"at most {MAX_QUERIES} queries of {MAX_QUERY_CHARACTERS} characters per request"
            )
        found = search_texts(queries, topk_of(request, 3, len(kb.texts)))

        def shown(hit) -> dict:
            document = {"id": hit.row, "contents": kb.texts[hit.row]}
            if request.return_scores:
                return {"document": document, "score": hit.score}
            return document

        return {"result": [[shown(hit) for hit in hits] for hits in found]}

    @app.post("/image_search")
    def image_search(request: ImageRequest):
        if (request.image_base64 is None) == (request.image_paths is None):
            refuse("give either image_base64 or image_paths")
        if request.image_base64 is None:
            given, read = request.image_paths, local_image
        else:
            given, read = request.image_base64, sent_image
        several = isinstance(given, list)
        if several and not 1 <= len(given) <= MAX_IMAGES:
            refuse(f"between 1 and {MAX_IMAGES} images per request")
        images = [read(item) for item in (given if several else [given])]
        found = search_images(images, topk_of(request, 5, len(kb.records)))
        results = [[[hit.title, hit.score] for hit in hits] for hits in found]
        records = [[kb.records[hit.row] | {"score": hit.score} for hit in hits] for hits in found]
        if several:
            return {"mode": "batch", "results": results, "records": records}
        return {"mode": "single", "results": results[0], "records": records[0]}

    return app


@dataclass
class Args:
    """Answer searches over HTTP as the authors' servers do."""

    kb: Path = Path("data/kb")
    host: str = "127.0.0.1"  # this machine only
    port: int = 8000
    device: str = "cpu"
    allow_local_paths: bool = False  # let clients name image files of this machine
    image_root: Path | None = None  # …but only under this folder
    max_image_bytes: int = 20_000_000


def main(args: Args):
    """Answer until stopped."""
    import uvicorn

    kb = KnowledgeBase.open(args.kb, args.device)
    app = make_app(kb, args.allow_local_paths, args.image_root, args.max_image_bytes)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (KnowledgeBaseError, ValueError) as error:
        fail(error)
