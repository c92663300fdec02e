"""Retrieval: which article does this image show, and which passages answer this query?

A knowledge base is a folder, laid out as the published MMhops-KB:

    text/text_corpus.jsonl    one passage per line: {"id": row, "contents": "title\\ntext"}
    text/e5_Flat.index        its vectors; score = E5("query: " + q) · E5("passage: " + contents)
    image/image_corpus.jsonl  one article per line: {"id": row, "title", "entity_id", "image_path"}
    image/CLIP_Flat.index     its vectors; score = ½·cos(image, image) + ½·cos(image, title), or
                              the first alone, where the encoder reads no text (the built-in one)
    manifest.json             encoders, counts, checksums; the published folder has none

Both searches are batched, and exact where the index is flat. `python -m knowledge.check` says how
often they are right, `python -m knowledge.server` answers them over HTTP.
"""

import json
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from files.images import image_key, open_image
from files.records import MISREAD, KnowledgeBaseError, refuse_code
from files.rows import JsonLines

TEXT_INDEX = Path("text/e5_Flat.index")
TEXT_CORPUS = Path("text/text_corpus.jsonl")
IMAGE_INDEX = Path("image/CLIP_Flat.index")
IMAGE_CORPUS = Path("image/image_corpus.jsonl")
FILES = (TEXT_INDEX, TEXT_CORPUS, IMAGE_INDEX, IMAGE_CORPUS)
LARGE = 100_000  # vectors: from here on, reading the whole index is what a search takes
# What made the published MMhops-KB, which carries no manifest.
PUBLISHED = {
    "text": {"kind": "e5", "name": "intfloat/e5-base-v2"},
    "image": {"kind": "clip", "name": "ViT-L-14-336", "pretrained": "openai"},
}


@dataclass(frozen=True)
class Hit:
    """One thing found. `text` is the passage ("" for an image hit), `row` its row in the corpus."""

    title: str
    text: str
    score: float
    row: int


def passage_hit(contents: str, score: float, row: int) -> Hit:
    """A hit of a passage, as the corpus writes it: "title\\ntext"."""
    title, _, text = contents.partition("\n")
    return Hit(title, text, score, row)


def passage_dtype(device: str) -> str:
    """What passages are encoded in: "bfloat16" on a CPU that multiplies it itself (elsewhere it is
    slower), else "float32". A vector of the one has a cosine above 0.9999 to that of the other."""
    import torch

    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bfloat16" if native and torch.device(device).type == "cpu" else "float32"


class E5Encoder:
    """E5 (Wang et al. 2022) through sentence-transformers: mean-pooled, L2-normalised. name: a
    Hugging Face name or a folder. max_length: tokens per text, as in the paper's servers [P]."""

    def __init__(self, name: str | Path, device: str | None = None, max_length: int = 256):
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = SentenceTransformer(str(name), device=device).eval()
        self.max_length = max_length

    def encode(self, texts: list[str], dtype="float32", progress=False) -> np.ndarray:
        """(N, d) float32 unit vectors, computed in `dtype`. `SentenceTransformer.encode` sorts by
        characters: with it, three of ten tokens would be padding."""
        import torch

        from engine.batches import like_length, on_each_core

        tokenizer, device = self.model.tokenizer, self.model.device
        ids = tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        # A batch's activations should stay in a CPU's cache, and fill a GPU.
        on_cpu = device.type == "cpu"
        batches = like_length([len(row) for row in ids], 1024 if on_cpu else 16384)
        lower = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        bar = tqdm(total=len(batches), disable=not progress)

        def encode_some(batches) -> list[torch.Tensor]:
            found = []
            with torch.inference_mode(), lower:
                for rows in batches:
                    inputs = {"input_ids": [ids[row] for row in rows]}
                    inputs = tokenizer.pad(inputs, return_tensors="pt").to(device)
                    found.append(self.model(dict(inputs))["sentence_embedding"].float().cpu())
                    bar.update()
            return found

        parts = on_each_core(encode_some, batches) if on_cpu else encode_some(batches)
        vectors = np.empty((len(texts), self.model.get_embedding_dimension()), np.float32)
        for rows, part in zip(batches, parts):
            vectors[rows] = torch.nn.functional.normalize(part, dim=1).numpy()
        return vectors

    def encode_queries(self, queries: list[str]) -> np.ndarray:
        """(N, d) float32 unit vectors. Never in bfloat16: its rounding depends on what else is in
        the batch, and a resumed run has other batches."""
        return self.encode([f"query: {query}" for query in queries])

    def encode_passages(self, passages: list[str], progress: bool = False) -> np.ndarray:
        """(N, d) float32 unit vectors of "title\\ntext" strings; bfloat16's rounding is in them
        where `passage_dtype` says so."""
        dtype = passage_dtype(self.model.device)
        return self.encode([f"passage: {passage}" for passage in passages], dtype, progress)


class ClipEncoder:
    """CLIP through open_clip. name: an open_clip model name (with `pretrained` weights) or a folder
    with open_clip_config.json and the weights. quick_gelu: OpenAI's activation, which open_clip
    takes only when told to; `knowledge.check` says which one made an index."""

    def __init__(self, name, pretrained: str | None = None, device="cpu", quick_gelu=False):
        import open_clip

        name = f"local-dir:{Path(name).resolve()}" if Path(name).is_dir() else str(name)
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=device, force_quick_gelu=quick_gelu
        )
        # loaded only where titles are encoded: its settings come from a file
        self.tokenize = lambda titles: open_clip.get_tokenizer(name)(titles)
        self.device = device
        self.model.eval()

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        """(N, d) float32 unit vectors."""
        import torch

        pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in images])
        with torch.inference_mode():
            vectors = self.model.encode_image(pixels.to(self.device), normalize=True)
        return vectors.float().cpu().numpy()

    def index_vectors(self, images: list[Image.Image], titles: list[str]) -> np.ndarray:
        """(N, d) float32: ½·norm(image) + ½·norm(title), as in the paper's servers not normalised
        again; so a query image scores ½·cos(image, image) + ½·cos(image, title)."""
        import torch

        with torch.inference_mode():
            tokens = self.tokenize(titles).to(self.device)
            text = self.model.encode_text(tokens, normalize=True).float().cpu().numpy()
        return 0.5 * self.encode_images(images) + 0.5 * text


def load_encoder(spec: dict, folder: Path, device: str):
    """The encoder that a manifest names; a relative name is a folder inside the knowledge base.
    DataError where its files name code to be run."""
    name = folder / spec["name"] if (folder / spec["name"]).is_dir() else spec["name"]
    refuse_code(name)
    if spec["kind"] == "e5":
        return E5Encoder(name, device=device, max_length=spec.get("max_length", 256))
    if spec["kind"] == "clip":
        return ClipEncoder(name, spec.get("pretrained"), device, spec.get("quick_gelu", False))
    if spec["kind"] == "none":  # a corpus without pictures
        return None
    if spec["kind"] == "atlas":
        from atlas.encoders import AtlasImageEncoder

        return AtlasImageEncoder(name)
    raise KnowledgeBaseError(
        f"{folder / 'manifest.json'} names an encoder of unknown kind {spec['kind']!r}"
    )


def read_manifest(folder: Path) -> dict:
    """The manifest of a knowledge base; {} where there is none. KnowledgeBaseError where the file
    is another one."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for entry in manifest.get("files", {}).values():
            _ = int(entry["bytes"]), str(entry["sha256"])
        encoders = manifest.get("encoders", PUBLISHED)
        _ = [encoders[of]["kind"] + encoders[of]["name"] for of in ("text", "image")]
        _ = int(encoders["text"].get("nprobe", 0)), int(encoders["text"].get("max_length", 0))
    except MISREAD as error:
        raise KnowledgeBaseError(
            f"{path} is no manifest of a knowledge base ({type(error).__name__}: {error}); build "
            "or download the folder again"
        ) from None
    return manifest


def open_index(path: Path, rows: int, corpus: Path, gpu: int | None = None, nprobe: int = 0):
    """A FAISS index, in memory that processes share, or on a GPU, by number. nprobe: the cells that
    a search visits, of an index that has cells. KnowledgeBaseError if it misfits its corpus."""
    import faiss

    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)  # vectors stay in the file
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:100]
        raise KnowledgeBaseError(
            f"{path} is not a FAISS index ({reason}); build or download it again"
        ) from None
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise KnowledgeBaseError(
            f"{path} does not use inner products; build it again with faiss.IndexFlatIP"
        )
    if index.ntotal != rows:
        raise KnowledgeBaseError(
            f"{path} has {index.ntotal} vectors but {corpus} has {rows} rows: "
            "they are not of one build"
        )
    # Several queries at once should be a product of matrices. FAISS's own threshold, queries · d =
    # 128,000, is tuned for dozens of threads; below it, all vectors are read anew for each query.
    # Of few vectors that takes milliseconds, and a score does not depend on the other queries.
    if rows >= LARGE:
        least = min(800 * faiss.omp_get_max_threads(), 32 * index.d)
        faiss.cvar.distance_compute_blas_threshold = least
    some = np.linspace(0, rows - 1, min(rows, 256)).astype(int).tolist()
    if hasattr(index, "codes") and not all(np.isfinite(index.reconstruct(x)).all() for x in some):
        raise KnowledgeBaseError(f"{path} holds vectors that are not finite; build it again")
    if nprobe:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)
    if gpu is None:
        return index
    if not hasattr(faiss, "StandardGpuResources"):
        raise KnowledgeBaseError("--index-device gpu needs the package faiss-gpu, not faiss-cpu")
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index)


def search(index, vectors: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
    """[(score, row)] of each vector's k nearest rows; fewer where the index has fewer."""
    if vectors.shape[1] != index.d:
        raise KnowledgeBaseError(
            f"the encoder gives {vectors.shape[1]} dimensions, the index holds {index.d}: "
            "it was built with another encoder"
        )
    if not np.isfinite(vectors).all():
        raise KnowledgeBaseError("the encoder's vectors are not finite: its weights are broken")
    scores, rows = index.search(np.ascontiguousarray(vectors), min(k, index.ntotal))  # (N, k) both
    found = zip(scores.tolist(), rows.tolist())
    return [[(score, row) for score, row in zip(*one) if row >= 0] for one in found]  # -1: no more


class KnowledgeBase:
    """Search over a folder; `KnowledgeBase.open(folder)` makes one. Equal queries are encoded
    once, and the latest `cache_size` remembered: a group's responses often ask the same thing."""

    def __init__(
        self, texts, text_index, text_encoder, records, image_index, image_encoder, cache_size=20000
    ):
        self.texts = texts  # row → "title\ntext"
        self.text_index = text_index
        self.text_encoder = text_encoder
        self.records = records  # row → {"title", "entity_id", "image_path"}
        self.image_index = image_index
        self.image_encoder = image_encoder
        self.sizes = len(texts), len(records)
        self.cache_size = cache_size
        # key → vector, the latest used last; a server has a thread for each kind
        self.vectors = {"text": OrderedDict(), "image": OrderedDict()}
        self.queries = 0  # how many were asked,
        self.encoded = 0  # and how many of them had to be encoded
        self.seconds = 0.0  # spent encoding and searching

    @classmethod
    def open(cls, folder: Path | str, device: str = "cpu", gpu: int | None = None):
        """device: of the encoders. gpu: number of the GPU that holds the indexes; None: the CPU's
        memory does. Raises KnowledgeBaseError where a file is missing or two files disagree."""
        folder = Path(folder)
        missing = [str(path) for path in FILES if not (folder / path).exists()]
        if missing:
            raise KnowledgeBaseError(
                f"{folder} is no knowledge base, it lacks {', '.join(missing)}; the built-in one "
                "is made with: python build_kb.py --out data/kb"
            )
        manifest = read_manifest(folder)
        for name, entry in manifest.get("files", {}).items():
            size = (folder / name).stat().st_size if (folder / name).exists() else "no"
            if size != entry["bytes"]:
                raise KnowledgeBaseError(
                    f"{folder / name} has {size} bytes, the manifest says {entry['bytes']}: "
                    f"the folder is damaged, build or download it again"
                )
        texts = JsonLines(folder / TEXT_CORPUS, "contents")
        records = JsonLines(folder / IMAGE_CORPUS)
        encoders = manifest.get("encoders", PUBLISHED)
        nprobe = encoders["text"].get("nprobe", 0)
        text_index = open_index(folder / TEXT_INDEX, len(texts), TEXT_CORPUS, gpu, nprobe)
        image_index = open_index(folder / IMAGE_INDEX, len(records), IMAGE_CORPUS, gpu)
        for corpus in (texts, records):  # a look at three rows: an error now, not after hours
            _ = [corpus[row] for row in {0, len(corpus) // 2, len(corpus) - 1} if len(corpus)]
        text_encoder = load_encoder(encoders["text"], folder, device)
        image_encoder = load_encoder(encoders["image"], folder, device)
        return cls(texts, text_index, text_encoder, records, image_index, image_encoder)

    def search_once(self, kind: str, keys: list[str], items: list, encode, index, k: int) -> list:
        """[(score, row)] of the k nearest to each item. Items of one key are the same: each key is
        encoded at most once, and searched for once."""
        started = time.perf_counter()
        unique = dict(zip(keys, items))
        known = self.vectors[kind]
        new = {key: item for key, item in unique.items() if key not in known}
        self.queries += len(keys)
        self.encoded += len(new)
        known.update(zip(new, encode(list(new.values())) if new else ()))
        for key in unique:
            known.move_to_end(key)
        found = dict(zip(unique, search(index, np.stack([known[key] for key in unique]), k)))
        while len(known) > self.cache_size:
            known.popitem(last=False)
        self.seconds += time.perf_counter() - started
        return [found[key] for key in keys]

    def text_search(self, queries: list[str], k: int = 3) -> list[list[Hit]]:
        """The k nearest passages of each query, best first."""
        if not queries:
            return []
        encode = self.text_encoder.encode_queries
        found = self.search_once("text", queries, queries, encode, self.text_index, k)
        return [[passage_hit(self.texts[row], score, row) for score, row in hits] for hits in found]

    def image_search(self, images: list, k: int = 1) -> list[list[Hit]]:
        """The k articles whose images look most like each image (path or PIL image), best first."""
        if not images or not len(self.records):
            return [[] for _ in images]

        def encode(new: list) -> np.ndarray:
            return self.image_encoder.encode_images([open_image(image) for image in new])

        keys = [image_key(image) for image in images]
        found = self.search_once("image", keys, images, encode, self.image_index, k)
        return [
            [Hit(self.records[row]["title"], "", score, row) for score, row in hits]
            for hits in found
        ]
