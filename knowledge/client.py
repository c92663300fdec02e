"""The searches of a knowledge base that a server answers: the authors' two servers, or ours.

    python train.py --text-url http://127.0.0.1:8000 --image-url http://127.0.0.1:8000

knowledge/server.py shows the requests and replies.
"""

import base64
import json
import math
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Literal

from files.images import image_bytes, image_key, image_size, open_image
from files.records import MISREAD, without_halves
from retrieval import Hit, KnowledgeBase, KnowledgeBaseError, passage_hit

MOST_BYTES = 64 * 2**20  # of an answer: 256 queries' passages are some 1 MB
QUERIES_PER_REQUEST = 256
IMAGES_PER_REQUEST = 32
# Less than our server takes: of a query; of a picture; of all pictures of a request.
MOST_CHARACTERS = 3_900  # QUERIES_PER_REQUEST of them are less than a million
MOST_IMAGE_BYTES = 15_000_000
REQUEST_BYTES = 30_000_000
REQUEST_PIXELS = 50_000_000
SIDE = 2048  # of a picture that is too large, scaled down; encoders look at a few hundred pixels


class RemoteKnowledgeBase:
    """`KnowledgeBase` over HTTP. text_url: one address, or several, "http://a,http://b", each of a
    part of the passages.

    tries: attempts per request; the wait between two doubles each time (six attempts take half a
    minute; the environment variable MMHOPS_SERVER_TRIES sets another number).

    Raises KnowledgeBaseError when a server refuses a request, or has not answered after all tries.
    """

    def __init__(
        self,
        text_url: str,
        image_url: str,
        tries: int = int(os.environ.get("MMHOPS_SERVER_TRIES", 6)),
        wait: float = 1.0,  # seconds after the first attempt
        timeout: float = 120.0,  # seconds per attempt
        cache_size: int = 20_000,
    ):
        import requests

        self.session = requests.Session()
        self.text_urls = [url.strip().rstrip("/") for url in text_url.split(",")]
        self.image_url = image_url.rstrip("/")
        self.tries = tries
        self.wait = wait
        self.timeout = timeout
        self.cache_size = cache_size
        self.cache = OrderedDict()  # what was asked → its hits
        self.seconds = 0.0  # spent waiting for answers
        entries = [
            self.call("GET", url + "/health", read=sizes).get("entries", 0)
            for url in self.text_urls
        ]
        self.first_rows = [sum(entries[:number]) for number in range(len(entries))]  # per server
        image = self.call("GET", self.image_url + "/health", read=sizes)
        # The authors' image server has images only, and calls them entries.
        images = image.get("image_entries", image.get("entries", 0))
        self.sizes = sum(entries), images

    def call(self, method: str, url: str, body: dict | None = None, *, read):
        """What `read` makes of a server's answer; for anything else: try again.

        That is status 500 and above, silence, an answer that takes too long or is too large, one
        that is no JSON, and one in which `read` finds a fault (MISREAD). Any other status but
        200 is a refusal.
        """
        from requests import RequestException
        from urllib3.exceptions import HTTPError

        for attempt in range(self.tries):
            try:
                status, answer = self.fetch(method, url, body)
                if status == 200:
                    return read(without_halves(json.loads(answer)))
                if status < 500:
                    raise KnowledgeBaseError(
                        f"the retrieval server at {url} refused a request: "
                        f"{answer[:300].decode('utf-8', 'replace')}"
                    )
                reason = f"status {status}"
            except (RequestException, HTTPError) as error:
                reason = type(error).__name__
            except MISREAD as error:
                reason = f"a bad answer, {type(error).__name__}: {str(error)[:100]}"
            if attempt + 1 < self.tries:
                time.sleep(self.wait * 2**attempt)
        raise KnowledgeBaseError(
            f"the retrieval server at {url} does not answer ({reason}, {self.tries} tries); "
            "start it again, then the same command (train.py: with --resume)"
        )

    def fetch(self, method: str, url: str, body: dict | None) -> tuple[int, bytes]:
        """(status, answer). Raises ValueError when it takes too long, or is too large."""
        deadline = time.monotonic() + self.timeout
        answer = bytearray()
        asked = {"json": body, "timeout": self.timeout, "stream": True}
        with self.session.request(method, url, **asked) as response:
            while piece := response.raw.read1(65_536, decode_content=True):
                answer += piece
                if len(answer) > MOST_BYTES:
                    raise ValueError(f"more than {MOST_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise ValueError(f"not complete after {self.timeout} seconds")
        return response.status_code, bytes(answer)

    def ask_once(self, keys: list, items: list, ask, size: int) -> list:
        """Answers in the items' order; only those not remembered are asked for, `size` per request.

        Items of one key are the same. ask: list of items → list of answers.
        """
        started = time.perf_counter()
        new = {key: item for key, item in zip(keys, items) if key not in self.cache}
        names = list(new)
        for start in range(0, len(names), size):
            part = names[start : start + size]
            self.cache.update(zip(part, ask([new[name] for name in part])))
        answers = [self.cache[key] for key in keys]
        while len(self.cache) > self.cache_size:
            self.cache.popitem(last=False)
        self.seconds += time.perf_counter() - started
        return answers

    def text_search(self, queries: list[str], k: int = 3) -> list[list[Hit]]:
        """The k nearest passages of each query, best first, of all servers together.

        Rows count on from one server to the next. Of a query the first MOST_CHARACTERS are sent.
        """
        queries = [query[:MOST_CHARACTERS] for query in queries]

        def ask(new: list[str]) -> list[list[Hit]]:
            body = {"queries": new, "topk": k, "return_scores": True}
            hits = [[] for _ in new]
            for url, first in zip(self.text_urls, self.first_rows):

                def read(answer: dict, first=first) -> list[list[Hit]]:
                    return read_hits(answer["result"], len(new), k, lambda x: text_hit(x, first))

                for mine, found in zip(hits, self.call("POST", url + "/retrieve", body, read=read)):
                    mine += found
            return [sorted(mine, key=lambda hit: -hit.score)[:k] for mine in hits]

        keys = [("text", query, k) for query in queries]
        return self.ask_once(keys, queries, ask, QUERIES_PER_REQUEST)

    def image_search(self, images: list, k: int = 1) -> list[list[Hit]]:
        """The k articles whose images look most like each image (path or PIL image), best first."""

        def ask(new: list) -> list[list[Hit]]:
            return [hits for part in image_requests(new) for hits in ask_for(part)]

        def ask_for(pictures: list[bytes]) -> list[list[Hit]]:
            sent = [base64.b64encode(picture).decode() for picture in pictures]
            body = {"image_base64": sent, "topk": k}

            def read(answer: dict) -> list[list[Hit]]:
                return read_hits(answer["records"], len(pictures), k, image_hit)

            return self.call("POST", self.image_url + "/image_search", body, read=read)

        keys = [("image", image_key(image), k) for image in images]
        return self.ask_once(keys, images, ask, IMAGES_PER_REQUEST)


def image_requests(images: list):
    """Yield the pictures' bytes, in lists that a server takes.

    Raises ValueError when one cannot be read.
    """
    part, held, pixels = [], 0, 0
    for image in images:
        data, area = sendable(image)
        if part and (held + len(data) > REQUEST_BYTES or pixels + area > REQUEST_PIXELS):
            yield part
            part, held, pixels = [], 0, 0
        part.append(data)
        held += len(data)
        pixels += area
    if part:
        yield part


def sendable(image) -> tuple[bytes, int]:
    """A picture's bytes, and its pixels; one that is too large for a request is scaled down.

    Raises ValueError when it cannot be read.
    """
    whole = open_image(image)  # all of it: a server refuses what is damaged behind its header
    data = image_bytes(image)
    width, height = image_size(image)
    if len(data) > MOST_IMAGE_BYTES or width * height > REQUEST_PIXELS:
        whole.thumbnail((SIDE, SIDE))
        data, (width, height) = image_bytes(whole), whole.size
    return data, width * height


def sizes(answer: dict) -> dict[str, int]:
    """What a server says of itself, its numbers alone."""
    return {name: int(value) for name, value in answer.items() if isinstance(value, int)}


def read_hits(found: list, count: int, k: int, read) -> list[list[Hit]]:
    """Hits of `count` items, at most k of each. Raises ValueError where an answer has others.

    >>> read_hits([[1, 2]], 2, 3, lambda hit: hit)
    Traceback (most recent call last):
    ValueError: hits of 1 items, not of 2
    """
    if len(found) != count:
        raise ValueError(f"hits of {len(found)} items, not of {count}")
    return [[read(hit) for hit in hits[:k]] for hits in found]


def text_hit(found: dict, first: int = 0) -> Hit:
    """found: {"document": {"id", "contents"}, "score"}. first: the number of the server's row 0."""
    document = found["document"]
    score = finite(found["score"])
    return passage_hit(document["contents"], score, first + int(document["id"]))


def image_hit(record: dict) -> Hit:
    """record: {"id", "title", "score", …}."""
    return Hit(str(record["title"]), "", finite(record["score"]), int(record["id"]))


def finite(score) -> float:
    """Raises ValueError for a score that cannot be ranked."""
    if not math.isfinite(score):
        raise ValueError(f"a score of {score}")
    return float(score)


def connect(
    kb: Path,
    text_url: str = "",
    image_url: str = "",
    device: str = "cpu",
    index_device: Literal["cpu", "gpu"] = "cpu",
):
    """The knowledge base of a folder, or of the servers where their addresses are given.

    device: of the encoders. index_device: "gpu" puts the indexes beside them.
    """
    if not text_url and not image_url:
        on_gpu = index_device == "gpu"
        return KnowledgeBase.open(kb, device, gpu_number(device) if on_gpu else None)
    if not text_url or not image_url:
        raise KnowledgeBaseError(
            "give both --text-url and --image-url; they may be the same address"
        )
    return RemoteKnowledgeBase(text_url, image_url)


def gpu_number(device: str) -> int:
    """Of "cuda:3": 3. Raises KnowledgeBaseError where the device is none.

    >>> gpu_number("cuda:3"), gpu_number("cuda")
    (3, 0)
    """
    kind, _, number = str(device).partition(":")
    if kind != "cuda":
        raise KnowledgeBaseError("--index-device gpu needs a GPU; there is none here")
    return int(number or 0)
