"""Retrieval: which article does this image show, and which passages answer this query?

A knowledge base is a folder (the layout of the published MMhops-KB, read and written without conversion):

    text/text_corpus.jsonl    one passage a line: {"id": row, "contents": "title\\ntext"}
    text/e5_Flat.index        its E5 vectors, row-aligned, FAISS flat inner product
    image/image_corpus.jsonl  one article a line: {"id": row, "title", "entity_id", "image_path"}
    image/CLIP_Flat.index     its image vectors, row-aligned
    manifest.json             which encoders made the vectors, counts, checksums (absent in the published KB)

Text search (E5, Wang et al. 2022): score(q, p) = e(`query: q`)·e(`passage: p`), e mean-pooled, L2-normalised.
Image search (the paper's servers): the article's vector is ½·norm(CLIP(image)) + ½·norm(CLIP(title)), not normalised
again; the query is norm(CLIP(image)); so score = ½·cos(image, image) + ½·cos(image, title).

Both searches are exact (flat indexes) and batched. Identical queries are encoded once, and recent ones remembered:
the eight responses of a group often ask the same thing, and encoding costs more than searching.

    python -m knowledge.check --kb data/kb      # are the files whole, and how often is the right thing found?
    python -m knowledge.server --kb data/kb      # the same searches over HTTP, see knowledge/server.py
"""

import hashlib
import json
import mmap
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

TEXT_INDEX, TEXT_CORPUS = Path("text/e5_Flat.index"), Path("text/text_corpus.jsonl")
IMAGE_INDEX, IMAGE_CORPUS = Path("image/CLIP_Flat.index"), Path("image/image_corpus.jsonl")
# What made the published MMhops-KB, which carries no manifest.
PUBLISHED = {
    "text": {"kind": "e5", "name": "intfloat/e5-base-v2"},
    "image": {"kind": "clip", "name": "ViT-L-14-336", "pretrained": "openai"},
}


class KnowledgeBaseError(RuntimeError):
    """A knowledge base folder that cannot be used; the message says which file, why, and what to do."""


@dataclass(frozen=True)
class Hit:
    """One thing found. `text` is the passage (empty for an image hit), `row` its row in the corpus."""

    title: str
    text: str
    score: float
    row: int


class E5Encoder:
    """E5 through sentence-transformers. name: a Hugging Face name or a folder. max_length in tokens, as the paper's servers."""

    def __init__(self, name: str | Path, device: str | None = None, max_length: int = 256):
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = SentenceTransformer(str(name), device=device)
        self.model.max_seq_length = max_length

    def encode(self, texts: list[str], progress: bool = False) -> np.ndarray:
        return self.model.encode(
            texts, batch_size=64, normalize_embeddings=True, show_progress_bar=progress
        ).astype(np.float32)

    def encode_queries(self, queries: list[str]) -> np.ndarray:
        """(N, d) float32 unit vectors."""
        return self.encode([f"query: {query}" for query in queries])

    def encode_passages(self, passages: list[str], progress: bool = False) -> np.ndarray:
        """(N, d) float32 unit vectors of "title\\ntext" strings."""
        return self.encode([f"passage: {passage}" for passage in passages], progress)


class ClipEncoder:
    """CLIP through open_clip. name: an open_clip model name (with `pretrained` weights) or a folder that
    holds open_clip_config.json and the weights."""

    def __init__(self, name: str | Path, pretrained: str | None = None, device: str = "cpu"):
        import open_clip

        name = f"local-dir:{Path(name).resolve()}" if Path(name).is_dir() else str(name)
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=device
        )
        self.tokenizer, self.device = open_clip.get_tokenizer(name), device
        self.model.eval()

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        """(N, d) float32 unit vectors."""
        import torch

        with torch.inference_mode():
            pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in images]).to(
                self.device
            )
            return self.model.encode_image(pixels, normalize=True).float().cpu().numpy()

    def index_vectors(self, images: list[Image.Image], titles: list[str]) -> np.ndarray:
        """(N, d) float32: ½·norm(image) + ½·norm(title), deliberately not normalised again."""
        import torch

        with torch.inference_mode():
            text = (
                self.model.encode_text(self.tokenizer(titles).to(self.device), normalize=True)
                .float()
                .cpu()
                .numpy()
            )
        return 0.5 * self.encode_images(images) + 0.5 * text


def load_encoder(spec: dict, folder: Path, device: str):
    """The encoder that a manifest names; a relative name is a folder inside the knowledge base."""
    name = folder / spec["name"] if (folder / spec["name"]).is_dir() else spec["name"]
    if spec["kind"] == "e5":
        return E5Encoder(name, device=device, max_length=spec.get("max_length", 256))
    if spec["kind"] == "clip":
        return ClipEncoder(name, spec.get("pretrained"), device=device)
    if spec["kind"] == "none":  # a corpus without pictures
        return None
    if spec["kind"] == "atlas":
        from atlas.encoders import AtlasImageEncoder

        return AtlasImageEncoder(name)
    raise KnowledgeBaseError(
        f"{folder / 'manifest.json'} names an encoder of unknown kind {spec['kind']!r}"
    )


def open_image(path: Path | str) -> Image.Image:
    """An image file as RGB. Raises ValueError, naming the file, when it is missing or no image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class JsonLines:
    """Rows of a JSONL corpus, read where they lie when they are asked for: processes on one machine share the file's pages.

    field: give this field of a record instead of the record. Raises KnowledgeBaseError where a record's id is not its row.
    """

    def __init__(self, path: Path, field: str | None = None):
        self.path, self.field = path, field
        with open(path, "rb") as file:
            self.map = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
            )
        step = 1 << 24
        ends = [
            np.flatnonzero(np.frombuffer(self.map[at : at + step], np.uint8) == 10) + at + 1
            for at in range(0, len(self.map), step)
        ]
        self.starts = np.concatenate(
            [[0], *ends, [len(self.map)] if self.map[-1:] != b"\n" and len(self.map) else []]
        ).astype(np.int64)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int):
        record = json.loads(self.map[self.starts[row] : self.starts[row + 1]])
        if int(record["id"]) != row:
            raise KnowledgeBaseError(
                f"{self.path}, line {row + 1}: the id is {record['id']!r}, but ids must be row numbers from 0"
            )
        return record[self.field] if self.field else record


class KnowledgeBase:
    """Exact search over a knowledge base folder; `KnowledgeBase.open(folder)` makes one."""

    def __init__(
        self,
        texts,
        text_index,
        text_encoder,
        records,
        image_index,
        image_encoder,
        cache_size: int = 20_000,
    ):
        self.texts, self.text_index, self.text_encoder = texts, text_index, text_encoder
        self.records, self.image_index, self.image_encoder = records, image_index, image_encoder
        self.cache_size, self.vectors = cache_size, OrderedDict()
        self.queries = self.encoded = 0  # how many were asked, and how many had to be encoded
        self.seconds = 0.0  # spent encoding and searching
        self.sizes = len(texts), len(records)

    @classmethod
    def open(cls, folder: Path | str, device: str = "cpu") -> "KnowledgeBase":
        """Open a folder. Raises KnowledgeBaseError where a file is missing or two files disagree."""
        folder = Path(folder)
        missing = [
            str(path)
            for path in (TEXT_INDEX, TEXT_CORPUS, IMAGE_INDEX, IMAGE_CORPUS)
            if not (folder / path).exists()
        ]
        if missing:
            raise KnowledgeBaseError(
                f"{folder} is no knowledge base, it lacks {', '.join(missing)}; build one with: "
                f"python build_kb.py --out {folder}"
            )
        manifest = (
            json.loads((folder / "manifest.json").read_text())
            if (folder / "manifest.json").exists()
            else {}
        )
        for name, entry in manifest.get("files", {}).items():
            size = (folder / name).stat().st_size if (folder / name).exists() else "no"
            if size != entry["bytes"]:
                raise KnowledgeBaseError(
                    f"{folder / name} has {size} bytes, the manifest says {entry['bytes']}: "
                    f"the folder is damaged, build or download it again"
                )
        texts, records = (
            JsonLines(folder / TEXT_CORPUS, "contents"),
            JsonLines(folder / IMAGE_CORPUS),
        )
        encoders = manifest.get("encoders", PUBLISHED)
        return cls(
            texts,
            open_index(folder / TEXT_INDEX, len(texts), TEXT_CORPUS),
            load_encoder(encoders["text"], folder, device),
            records,
            open_index(folder / IMAGE_INDEX, len(records), IMAGE_CORPUS),
            load_encoder(encoders["image"], folder, device),
        )

    def encode_once(self, keys: list[str], items: list, encode) -> np.ndarray:
        """(N, d) vectors of the items; items of one key are the same, and encoded at most once while remembered."""
        new = {key: item for key, item in zip(keys, items) if key not in self.vectors}
        self.queries, self.encoded = self.queries + len(keys), self.encoded + len(new)
        if new:
            self.vectors.update(zip(new, encode(list(new.values()))))
        for key in keys:
            self.vectors.move_to_end(key)
        vectors = np.stack([self.vectors[key] for key in keys])
        while len(self.vectors) > self.cache_size:
            self.vectors.popitem(last=False)
        return vectors

    def text_search(self, queries: list[str], k: int = 3) -> list[list[Hit]]:
        """The k nearest passages of each query, best first."""
        if not queries:
            return []
        started = time.perf_counter()
        vectors = self.encode_once(
            [f"text {query}" for query in queries], queries, self.text_encoder.encode_queries
        )
        found = search(self.text_index, vectors, k)
        self.seconds += time.perf_counter() - started
        return [
            [Hit(*self.texts[row].partition("\n")[::2], score, row) for score, row in pairs]
            for pairs in found
        ]

    def image_search(self, images: list, k: int = 1) -> list[list[Hit]]:
        """The k articles whose images look most like each image (a path or a PIL image), best first."""
        if not images or not len(self.records):
            return [[] for _ in images]
        started = time.perf_counter()
        keys = [
            f"image {hashlib.sha256(i.tobytes()).hexdigest() if isinstance(i, Image.Image) else i}"
            for i in images
        ]
        vectors = self.encode_once(
            keys,
            images,
            lambda new: self.image_encoder.encode_images(
                [image if isinstance(image, Image.Image) else open_image(image) for image in new]
            ),
        )
        found = search(self.image_index, vectors, k)
        self.seconds += time.perf_counter() - started
        return [
            [Hit(self.records[row]["title"], "", score, row) for score, row in pairs]
            for pairs in found
        ]


def open_index(path: Path, rows: int, corpus: Path):
    """A FAISS index, on the GPU if FAISS has one. Raises KnowledgeBaseError unless it has as many rows as its corpus."""
    import faiss

    try:
        index = faiss.read_index(
            str(path), faiss.IO_FLAG_MMAP_IFC
        )  # vectors stay in the file, shared by all processes
    except RuntimeError as error:
        raise KnowledgeBaseError(
            f"{path} is not a FAISS index ({str(error).splitlines()[0][:100]}); build or download it again"
        ) from None
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise KnowledgeBaseError(
            f"{path} does not use inner products; build it again with faiss.IndexFlatIP"
        )
    if index.ntotal != rows:
        raise KnowledgeBaseError(
            f"{path} has {index.ntotal} vectors but {corpus} has {rows} rows: they are not of one build"
        )
    if getattr(faiss, "get_num_gpus", lambda: 0)():
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    return index


def search(index, vectors: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
    """[(score, row)] of each vector's k nearest rows; fewer where the index has fewer."""
    if vectors.shape[1] != index.d:
        raise KnowledgeBaseError(
            f"the encoder gives {vectors.shape[1]} dimensions, the index holds {index.d}: "
            "it was built with another encoder"
        )
    scores, rows = index.search(np.ascontiguousarray(vectors), min(k, index.ntotal))
    return [[(float(s), int(r)) for s, r in zip(*pair)] for pair in zip(scores, rows)]


def check(folder: Path) -> dict:
    """Verify a KB's checksums and measure recall on the checks that were written beside it, if any.

    `check/text.jsonl`: {"query", "rows": gold passages}; `check/image.jsonl`: {"image", "kind", "row": gold article}.
    """
    kb = KnowledgeBase.open(folder)
    manifest = (
        json.loads((folder / "manifest.json").read_text())
        if (folder / "manifest.json").exists()
        else {"files": {}}
    )
    for name, entry in manifest["files"].items():
        if checksum(folder / name) != entry["sha256"]:
            raise KnowledgeBaseError(
                f"{folder / name} is not the file the manifest describes: build or download the folder again"
            )
    result = {
        "passages": len(kb.texts),
        "articles_with_image": len(kb.records),
        "checksums": "match" if manifest["files"] else "none given",
    }
    if (folder / "check" / "text.jsonl").exists():
        checks = [
            json.loads(line) for line in open(folder / "check" / "text.jsonl", encoding="utf-8")
        ]
        found = kb.text_search([c["query"] for c in checks], 3)
        for k in (1, 2, 3):
            right = [
                any(hit.row in c["rows"] for hit in hits[:k]) for c, hits in zip(checks, found)
            ]
            result[f"text R@{k} (n={len(checks)})"] = round(float(np.mean(right)), 4)
    if (folder / "check" / "image.jsonl").exists():
        checks = [
            json.loads(line) for line in open(folder / "check" / "image.jsonl", encoding="utf-8")
        ]
        found = kb.image_search([folder / c["image"] for c in checks], 1)
        for kind in dict.fromkeys(c["kind"] for c in checks):
            right = [hits[0].row == c["row"] for c, hits in zip(checks, found) if c["kind"] == kind]
            result[f"image R@1 {kind} (n={len(right)})"] = round(float(np.mean(right)), 4)
    return result


@dataclass
class Check:
    """Verify a knowledge base and print how often its retrievers find the right thing."""

    kb: Path = Path("data/kb")


@dataclass
class Serve:
    """Answer searches over HTTP as the authors' servers do (see knowledge/server.py)."""

    kb: Path = Path("data/kb")
    host: str = "127.0.0.1"  # this machine only
    port: int = 8000
    device: str = "cpu"
    allow_local_paths: bool = False  # let clients name image files of this machine
    image_root: Path | None = None  # …but only under this folder
    max_image_bytes: int = 20_000_000


def main():
    import tyro
    from rich.console import Console
    from rich.table import Table

    args = tyro.extras.subcommand_cli_from_dict({"check": Check, "serve": Serve})
    if isinstance(args, Serve):
        from knowledge.server import serve

        return serve(
            KnowledgeBase.open(args.kb, args.device),
            args.host,
            args.port,
            allow_local_paths=args.allow_local_paths,
            image_root=args.image_root,
            max_image_bytes=args.max_image_bytes,
        )
    table = Table("figure", "value", title=f"retrieval over {args.kb}")
    for name, value in check(args.kb).items():
        table.add_row(name, str(value))
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except (KnowledgeBaseError, ValueError) as error:
        sys.exit(f"error: {error}")
