"""Build a knowledge base: articles with images → passages → vectors → two FAISS indexes.

    python build_kb.py --out data/kb                       # the atlas, the built-in one: this file
    python build_kb.py --source markdown --path my-articles --out data/mine    # knowledge/index.py

The folder has the layout of the published MMhops-KB (retrieval.py) and `manifest.json`; the atlas's
also `entities.jsonl` (relations and typed attributes, for mmhops/build.py), `images/`, `photos/`
(other pictures of the same things, to ask about) and `check/` (for knowledge/check.py). A second
run with the same sources finds the fingerprint in the manifest and stops.
"""

import hashlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

# Before torch: OpenMP threads that spin while they wait stall shared machines.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import faiss
import numpy as np
from PIL import Image

import retrieval
from atlas.articles import MissingSource, read_atlas
from atlas.checks import text_checks
from atlas.encoders import AtlasImageEncoder, convert_e5
from atlas.pictures import augment, disturb_all
from data import DataError
from files.records import FAULTS, write_jsonl
from files.terminal import fail
from knowledge.folder import building, is_current, publish, write_manifest
from knowledge.pieces import by_words

# Raise it when passages or encoders are made in another way: old folders are then built again.
RULES = 3
MAX_WORDS = 48  # of a passage, its title included [own; the authors' rollouts: chars:800:200]
AUGMENTED = 2  # augmented pictures of an entity, to ask questions about
# zlib's levels for PNG files. Those with noise are not compressed: it would make them only a third
# smaller, and slower to read.
PNG_LEVEL, NOISY_PNG_LEVEL = 1, 0


def write_index(path: Path, vectors: np.ndarray):
    """(N, d) float32 vectors to a FAISS flat inner-product index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    faiss.write_index(index, str(path))


def fingerprint(entities: list[dict]) -> str:
    """Changes when an article, a relation, an image's size or RULES changes."""

    def sized(value):
        return value.size if isinstance(value, Image.Image) else value

    digest = hashlib.sha256(repr((RULES, MAX_WORDS, AUGMENTED)).encode())
    for entity in entities:
        described = [(name, sized(value)) for name, value in entity.items() if name != "photos"]
        photos = [(name, photo.size) for name, photo in entity["photos"].items()]
        digest.update((repr(described) + repr(photos)).encode())
    return digest.hexdigest()


def build(out: Path, entities: list[dict] | None = None, say=print):
    """Build the knowledge base of the entities (by default the atlas's) in `out`.

    Does nothing where the one in `out` is of the same entities. Raises KnowledgeBaseError where
    `out` was not built by this command.
    """
    # 1) What is to be built, and is it there already?
    started = time.time()
    entities = read_atlas() if entities is None else entities
    mark = fingerprint(entities)
    if is_current(out, mark):
        say(f"{out} is up to date")
        return
    work = building(out)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    say(f"read {len(entities)} articles in {time.time() - started:.0f} s")

    # 2) Pictures: the article's own, indexed, and others of the same thing, to ask about.
    started = time.time()
    pictured = [entity for entity in entities if entity["image"]]
    photo_paths = write_pictures(work, pictured)
    count = sum(len(of_one) for of_one in photo_paths.values())
    say(f"wrote {len(pictured)} images and {count} photos in {time.time() - started:.0f} s")

    # 3) Passages, indexed.
    started = time.time()
    corpus, rows = cut(entities)
    text_encoder = write_passages(work, corpus)
    seconds = time.time() - started
    rate = len(corpus) / seconds
    say(f"indexed {len(corpus)} passages in {seconds:.0f} s ({rate:.0f} per second)")

    # 4) Searches with known answers, and the relations from which questions are made.
    write_jsonl(work / "check" / "text.jsonl", text_checks(entities, rows))
    write_jsonl(work / "check" / "image.jsonl", image_checks(pictured, photo_paths))
    write_jsonl(
        work / "entities.jsonl",
        (entity_record(entity, rows, photo_paths.get(entity["id"], {})) for entity in entities),
    )

    # 5) The manifest; then the folder gets its name.
    counts = {"passages": len(corpus), "articles": len(entities), "images": len(pictured)}
    encoders = {
        "text": text_encoder,
        "image": {"kind": "atlas", "name": "encoders/image", "dim": 256},
    }
    files = [*retrieval.FILES, Path("entities.jsonl")]
    write_manifest(work, "atlas", mark, counts, encoders, files)
    publish(work, out)
    say(f"wrote {out}: {len(entities)} articles, {len(pictured)} images, {len(corpus)} passages")


def write_pictures(work: Path, pictured: list[dict]) -> dict[str, dict]:
    """Fit the image encoder; write images/, photos/, the image index and its corpus.

    Returns {entity id: {name of a photo: its path in the folder}}.
    """
    # 1) The encoder, and the article's image and its photos, by their path in the folder.
    images = [entity["image"] for entity in pictured]
    vectors = AtlasImageEncoder().fit(images, work / "encoders" / "image")  # (N, 256)
    augmented = [disturb_all(augment, images, 1000 + i) for i in range(AUGMENTED)]
    corpus, pictures, paths = [], {}, {}
    for row, entity in enumerate(pictured):
        name = entity["id"]
        image_path = f"images/{name}.png"
        pictures[image_path] = entity["image"]
        corpus.append(
            {"id": row, "title": entity["title"], "entity_id": name, "image_path": image_path}
        )
        photos = entity["photos"] | {f"augmented{i}": of[row] for i, of in enumerate(augmented)}
        paths[name] = {kind: f"photos/{name}.{kind}.png" for kind in photos}
        pictures |= {paths[name][kind]: photo for kind, photo in photos.items()}

    # 2) Written, on every core: Pillow compresses outside the interpreter's lock.
    (work / "images").mkdir()
    (work / "photos").mkdir()

    def save(path: str, picture: Image.Image):
        level = NOISY_PNG_LEVEL if ".augmented" in path else PNG_LEVEL
        picture.save(work / path, compress_level=level)

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, pictures, pictures.values()))
    write_index(work / retrieval.IMAGE_INDEX, vectors)
    write_jsonl(work / retrieval.IMAGE_CORPUS, corpus)
    return paths


def cut(entities: list[dict]) -> tuple[list[str], dict[str, dict]]:
    """All passages ("title\\ntext"), and {entity id: {field: the rows of its passages}}."""
    corpus = []
    rows = {}
    for entity in entities:
        rows[entity["id"]] = {}
        for field, text in by_words(entity["title"], entity["fields"].items(), MAX_WORDS):
            rows[entity["id"]].setdefault(field, []).append(len(corpus))
            corpus.append(f"{entity['title']}\n{text}")
    return corpus, rows


def write_passages(work: Path, corpus: list[str]) -> dict:
    """Write the text encoder, the text index and its corpus. Returns the encoder's entry in the
    manifest; `dtype` is there because vectors differ a little between bfloat16 and float32."""
    convert_e5(work / "encoders" / "text")
    encoder = retrieval.E5Encoder(work / "encoders" / "text")
    vectors = encoder.encode_passages(corpus, progress=True)  # (N, d)
    write_index(work / retrieval.TEXT_INDEX, vectors)
    write_jsonl(
        work / retrieval.TEXT_CORPUS,
        ({"id": row, "contents": contents} for row, contents in enumerate(corpus)),
    )
    dtype = retrieval.passage_dtype(encoder.model.device)
    return {"kind": "e5", "name": "encoders/text", "dim": vectors.shape[1], "dtype": dtype}


def image_checks(pictured: list[dict], photos: dict[str, dict]) -> list[dict]:
    """{"image", "kind", "row"} of every photo; "augmented0" and "augmented1" are of one kind."""
    return [
        {"image": path, "kind": name.rstrip("0123456789"), "row": row}
        for row, entity in enumerate(pictured)
        for name, path in photos[entity["id"]].items()
    ]


def entity_record(entity: dict, rows: dict[str, dict], photos: dict[str, str]) -> dict:
    """An entity without its article and pictures, but with the rows and paths where they are."""
    record = {
        name: value for name, value in entity.items() if name not in ("fields", "photos", "image")
    }
    record["rows"] = rows[entity["id"]]
    record["image"] = f"images/{entity['id']}.png" if entity["image"] else None
    record["photos"] = photos
    return record


@dataclass
class Args:
    """Build a knowledge base: the built-in one, or that of another source."""

    out: Path = Path("data/kb")
    source: Literal["atlas", "evqa", "wiki6m", "searchr1", "markdown"] = "atlas"
    path: Path | None = None  # the source's file or folder
    images: Path | None = None  # evqa, wiki6m: where their pictures are
    text_encoder: str = "intfloat/e5-base-v2"  # Hugging Face name or folder of an E5
    image_encoder: str = "ViT-L-14-336"  # open_clip name or folder
    pretrained: str = "openai"  # weights of an open_clip name
    # words:N, whole sentences, the title included; or chars:SIZE:OVERLAP (knowledge/pieces.py)
    passages: str = "words:100"
    limit: int | None = None  # articles
    index: str = "Flat"  # of the passages: exact, or FAISS's name of a smaller one: IVF4096,PQ64
    nprobe: int = 32  # cells that a search visits, where the index has cells


def main(args: Args):
    if args.source == "atlas":
        if args != Args(out=args.out):
            raise DataError("--source atlas takes --out alone; name the source that is meant")
        build(args.out)
        return
    from engine import distributed
    from knowledge import index
    from knowledge.pieces import splitter

    if args.path is None:
        raise DataError(f"--source {args.source} needs --path, its file or folder")
    split = splitter(args.passages)
    distributed.start(timedelta(days=7))  # one rank reads the articles, the others wait for it
    rank, _ = distributed.world()
    try:
        index.build(
            args.source,
            args.path,
            args.out,
            args.images,
            {
                "text": {"kind": "e5", "name": args.text_encoder},
                "image": picture_encoder(args.image_encoder, args.pretrained),
            },
            split=split,
            rules=args.passages,
            limit=args.limit,
            index=args.index,
            nprobe=args.nprobe,
            device=distributed.local_device(),
            say=print if rank == 0 else lambda *_: None,
        )
    finally:
        distributed.stop()


def picture_encoder(name: str, pretrained: str) -> dict:
    """The manifest's entry of a folder (the atlas's encoder or open_clip's) or open_clip name."""
    if (Path(name) / "head.safetensors").exists():
        return {"kind": "atlas", "name": name}
    if Path(name).is_dir():
        return {"kind": "clip", "name": name}
    # OpenAI's weights were trained with QuickGELU, which open_clip takes only when told to
    return {
        "kind": "clip",
        "name": name,
        "pretrained": pretrained,
        "quick_gelu": pretrained == "openai",
    }


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (MissingSource, *FAULTS) as error:
        fail(error)
