"""Retrieval over HTTP, as the authors' two servers answer (text on port 8000, images on 9999).

    python -m knowledge.server --kb data/kb                     # both on http://127.0.0.1:8000

    POST /retrieve       {"queries": [..], "topk": 3, "return_scores": true}   (also Search-R1's)
                       → {"result": [[{"document": {"id", "contents"}, "score"}]]}
    POST /image_search   {"image_base64": ".." or [..], "topk": 5}
                       → {"mode", "results": [[title, score]], "records": [{..}]}
    GET  /health

Eight training processes can share one knowledge base this way, on this machine or another.
"""

import asyncio
import base64
import binascii
import io
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from files.images import image_size, open_image
from files.records import FAULTS
from files.terminal import fail
from knowledge.batcher import Batcher
from retrieval import KnowledgeBase

# What a request may hold, and all of them together.
MAX_TOPK = 100
MAX_QUERIES = 2048
MAX_QUERY_CHARACTERS = 10_000
MAX_CHARACTERS = 1_000_000  # of all queries
MAX_IMAGES = 256
MAX_PIXELS = 100_000_000  # of all images
MAX_BODY = 64 * 2**20  # bytes
MAX_BODIES = 1024 * 2**20  # bytes, of all requests that are being read or answered
MAX_REQUESTS = 256
SECONDS_TO_SEND = 60  # a body, however many pieces it comes in
SECONDS_TO_ANSWER = 100  # less than our client waits
# What a batch may cost, so that the next one begins soon.
BATCH_CHARACTERS = 100_000
BATCH_PIXELS = 50_000_000  # 150 MB, decoded


class TextRequest(BaseModel):
    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


class ImageRequest(BaseModel):
    image_base64: str | list[str] | None = None
    image_paths: str | list[str] | None = None
    topk: int | None = None


class BodyLimit:
    """An ASGI application that reads a request's body before another one parses it.

    413: the body has too many bytes. 408: it comes too slowly. 503: other requests hold too many.
    """

    def __init__(self, app):
        self.app = app
        self.held = 0  # bytes, of all requests

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = bytearray()
        try:
            status = await self.read(scope, receive, body)
            if status:
                return await refuse_body(send, status)
            given = False

            async def again():
                nonlocal given
                if given:
                    return await receive()  # only that the client went away
                given = True
                return {"type": "http.request", "body": bytes(body), "more_body": False}

            await self.app(scope, again, send)
        finally:
            self.held -= len(body)

    async def read(self, scope, receive, body: bytearray) -> int:
        """Fill `body`. Returns the status of a refusal, or 0."""
        said = dict(scope["headers"]).get(b"content-length", b"0")
        # more digits than Python reads as a number are too many bytes, too
        if not said.isdigit() or len(said) > 20 or int(said) > MAX_BODY:
            return 413
        deadline = time.monotonic() + SECONDS_TO_SEND
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                return 408
            piece = message.get("body", b"")
            body += piece
            self.held += len(piece)
            if len(body) > MAX_BODY:
                return 413
            if self.held > MAX_BODIES:
                return 503
            more = message["type"] == "http.request" and message.get("more_body", False)
        return 0


async def refuse_body(send, status: int):
    reasons = {
        413: f"a request may have at most {MAX_BODY} bytes",
        408: f"a request must be complete after {SECONDS_TO_SEND} seconds",
        503: "too much is being asked at this moment; try again",
    }
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reasons[status].encode()})


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
    app.add_middleware(BodyLimit)

    def find_images(images: list[Path | bytes], k: int) -> list:
        """Opened here, a batch at a time: open, they are a hundred times as large."""
        opened = [open_image(x if isinstance(x, Path) else io.BytesIO(x)) for x in images]
        return kb.image_search(opened, k)

    search_texts = Batcher(kb.text_search, len, BATCH_CHARACTERS)
    search_images = Batcher(find_images, pixels_of, BATCH_PIXELS)

    def refuse(reason: str, status: int = 400):
        raise HTTPException(status, reason)

    async def answers(search: Batcher, items: list, k: int) -> list:
        try:
            future = search.submit(items, k)
            return await asyncio.wait_for(asyncio.wrap_future(future), SECONDS_TO_ANSWER)
        except TimeoutError:  # which has cancelled it
            refuse(f"no answer after {SECONDS_TO_ANSWER} seconds; ask for less, or again", 503)
        except ValueError:
            refuse("one of the images cannot be read")

    def topk_of(request, default: int, entries: int) -> int:
        topk = default if request.topk is None else request.topk
        if not 1 <= topk <= MAX_TOPK:
            refuse(f"topk must be between 1 and {min(MAX_TOPK, entries)}")
        return topk

    def local_image(name: str) -> Path:
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
        return path

    def sent_image(data: str) -> bytes:
        if data.startswith("data:"):  # data:image/png;base64,…
            data = data.partition(",")[2]
        if len(data) > max_image_bytes * 4 // 3 + 4:
            refuse(f"an image may have at most {max_image_bytes} bytes")
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            refuse("image_base64 is not base64")

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

    # What costs least to check comes first.
    @app.post("/retrieve")
    async def retrieve(request: TextRequest):
        queries, topk = request.queries, topk_of(request, 3, len(kb.texts))
        if not queries or not all(query.strip() for query in queries):
            refuse("queries must hold at least one string, and no empty one")
        if len(queries) > MAX_QUERIES or max(map(len, queries)) > MAX_QUERY_CHARACTERS:
            refuse(
                f"at most {MAX_QUERIES} queries of {MAX_QUERY_CHARACTERS} characters per request"
            )
        if sum(map(len, queries)) > MAX_CHARACTERS:
            refuse(f"at most {MAX_CHARACTERS} characters per request")
        found = await answers(search_texts, queries, topk)

        def shown(hit) -> dict:
            document = {"id": hit.row, "contents": kb.texts[hit.row]}
            if request.return_scores:
                return {"document": document, "score": hit.score}
            return document

        return {"result": [[shown(hit) for hit in hits] for hits in found]}

    @app.post("/image_search")
    async def image_search(request: ImageRequest):
        topk = topk_of(request, 5, len(kb.records))
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
        try:
            pixels = sum(map(pixels_of, images))
        except ValueError as error:
            refuse(str(error))
        if pixels > MAX_PIXELS:
            refuse(f"at most {MAX_PIXELS} pixels per request; these images have {pixels}")
        found = await answers(search_images, images, topk)
        results = [[[hit.title, hit.score] for hit in hits] for hits in found]
        records = [[kb.records[hit.row] | {"score": hit.score} for hit in hits] for hits in found]
        if several:
            return {"mode": "batch", "results": results, "records": records}
        return {"mode": "single", "results": results[0], "records": records[0]}

    return app


def pixels_of(image: Path | bytes) -> int:
    """By its header. Raises ValueError where it is no image of a kind that is opened."""
    try:
        width, height = image_size(image if isinstance(image, Path) else io.BytesIO(image))
        return width * height
    except ValueError as error:
        name = image if isinstance(image, Path) else "image_base64"
        kind = type(error.__cause__).__name__
        raise ValueError(f"{name} does not hold an image ({kind})") from None


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
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        limit_concurrency=MAX_REQUESTS,
    )


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except FAULTS as error:
        fail(error)
