"""The searches of a knowledge base that a server answers: the authors' two servers, or ours.

    python train.py --text-url http://127.0.0.1:8000 --image-url http://127.0.0.1:8000

knowledge/server.py shows the requests and replies.
"""

import base64
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Literal

from files.images import image_bytes, image_key
from retrieval import Hit, KnowledgeBase, KnowledgeBaseError, passage_hit

QUERIES_PER_REQUEST = 256
IMAGES_PER_REQUEST = 32


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
        entries = [self.call("GET", url + "/health").get("entries", 0) for url in self.text_urls]
        self.first_rows = [sum(entries[:number]) for number in range(len(entries))]  # per server
        image = self.call("GET", self.image_url + "/health")
        # The authors' image server has images only, and calls them entries.
        images = image.get("image_entries", image.get("entries", 0))
        self.sizes = sum(entries), images

    def call(self, method: str, url: str, body: dict | None = None) -> dict:
        """A server's answer. Status 500 and above, like silence, means: try again."""
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
                f"the retrieval server at {url} does not answer ({reason}, {self.tries} tries); "
                "start it again, then go on with --resume"
            )
        if response.status_code != 200:
            raise KnowledgeBaseError(
                f"the retrieval server at {url} refused a request: {response.text[:300]}"
            )
        return response.json()

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

        Rows count on from one server to the next.
        """

        def ask(new: list[str]) -> list[list[Hit]]:
            body = {"queries": new, "topk": k, "return_scores": True}
            hits = [[] for _ in new]
            for url, first in zip(self.text_urls, self.first_rows):
                for mine, found in zip(hits, self.call("POST", url + "/retrieve", body)["result"]):
                    mine += [text_hit(hit, first) for hit in found]
            return [sorted(mine, key=lambda hit: -hit.score)[:k] for mine in hits]

        keys = [("text", query, k) for query in queries]
        return self.ask_once(keys, queries, ask, QUERIES_PER_REQUEST)

    def image_search(self, images: list, k: int = 1) -> list[list[Hit]]:
        """The k articles whose images look most like each image (path or PIL image), best first."""

        def ask(new: list) -> list[list[Hit]]:
            sent = [base64.b64encode(image_bytes(image)).decode() for image in new]
            body = {"image_base64": sent, "topk": k}
            found = self.call("POST", self.image_url + "/image_search", body)["records"]
            return [[image_hit(record) for record in records] for records in found]

        keys = [("image", image_key(image), k) for image in images]
        return self.ask_once(keys, images, ask, IMAGES_PER_REQUEST)


def text_hit(found: dict, first: int = 0) -> Hit:
    """found: {"document": {"id", "contents"}, "score"}. first: the number of the server's row 0."""
    document = found["document"]
    return passage_hit(document["contents"], found["score"], first + int(document["id"]))


def image_hit(record: dict) -> Hit:
    """record: {"id", "title", "score", …}."""
    return Hit(record["title"], "", record["score"], int(record["id"]))


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
