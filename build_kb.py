"""Build a knowledge base: articles with images → passages → vectors → two FAISS indexes.

    python build_kb.py --out data/kb                                                   # the embedded one, this file
    python build_kb.py --source markdown --path my-articles --out data/mine            # or evqa, wiki6m, searchr1

1. **Passages.** Articles of the atlas are written in fields, so passages are too: "title\\nField: value", a long
   field split at sentences into pieces of at most 48 words. (How the paper chunks is not published.)
2. **Vectors.** E5 for passages, the image encoder for each article's image (see `retrieval.py`).
3. **Folder.** The layout of the published MMhops-KB plus `manifest.json`; beside it `entities.jsonl` (relations and
   typed attributes, for `mmhops/build.py`), `images/`, `photos/` (other pictures of the same things, to ask about)
   and `check/` (queries with known answers, for `python -m knowledge.check`).

The folder is built under a temporary name and renamed when it is complete: a killed run leaves nothing that could be
mistaken for a knowledge base. A second run with the same sources finds the fingerprint in the manifest and stops.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: spinning OpenMP threads stall shared machines

import faiss
import numpy as np
from PIL import Image

import retrieval
from atlas.articles import MissingSource, read_atlas
from atlas.encoders import AtlasImageEncoder, convert_e5, write_json
from atlas.pictures import augment, disturb_all
from data import DataError

RULES = 2  # raise it when passages or encoders are made in another way: old folders are then built again
MAX_WORDS = 48
AUGMENTED = 2  # augmented pictures of an entity, to ask questions about


def passages(title: str, fields, max_words: int = MAX_WORDS) -> list[tuple[str, str]]:
    """Cut an article into [(field, text)], text = "Field: piece", title and text together at most `max_words` words.

    fields: [(field, value)]; a field without a name gives its pieces alone.

    >>> passages("Chad", [("Climate", "tropical in south. Desert in north."), ("", "Flat.")], max_words=5)
    [('Climate', 'Climate: tropical in south.'), ('Climate', 'Climate: Desert in north.'), ('', 'Flat.')]
    """
    out = []
    for field, value in fields:
        head = f"{field}: " if field else ""
        room = max(1, max_words - len(f"{title} {head}".split()))
        piece = []
        for sentence in re.split(r"(?<=[.;!?])\s+", value):
            words = sentence.split()
            if piece and len(piece) + len(words) > room:
                out.append((field, head + " ".join(piece)))
                piece = []
            while len(words) > room:
                out.append((field, head + " ".join(words[:room])))
                words = words[room:]
            piece += words
        if piece:
            out.append((field, head + " ".join(piece)))
    return out


# Natural questions about an attribute or relation, used to measure the text retriever.
CHECK_QUERIES = {
    "capital": "What is the capital of {}?",
    "currency": "Which currency is used in {}?",
    "national anthem": "What is the title of the national anthem of {}?",
    "highest point": "What is the highest point in {}?",
    "internet country code": "What is the internet country code of {}?",
    "nationality": "What do you call a person from {}?",
    "area": "What is the total area of {}?",
    "population": "How many people live in {}?",
    "coastline": "How long is the coastline of {}?",
    "length of the land borders": "How long are the land borders of {} in total?",
    "highest elevation": "How high is the highest point of {}?",
    "median age": "What is the median age in {}?",
    "life expectancy": "What is the life expectancy at birth in {}?",
    "number of airports": "How many airports does {} have?",
    "date of independence": "When did {} become independent?",
    "date of the national holiday": "When is the national holiday of {}?",
    "time zone of the capital": "Which time zone is the capital of {} in?",
    "largest export partner": "Which country buys the most exports from {}?",
    "largest import partner": "From which country does {} import the most?",
    "longest border": "With which country does {} share its longest land border?",
    "country": "In which country is {}?",
    "administered by": "Which country administers {}?",
}


def text_checks(entities: list[dict], count: int = 600, seed: int = 0) -> list[dict]:
    """Questions with the rows of the passages that answer them, drawn evenly over what can be asked."""
    rng, pools = random.Random(seed), {}
    for entity in entities:
        for name, entry in (entity["attributes"] | entity["relations"]).items():
            if name in CHECK_QUERIES and entity["rows"].get(entry["field"]):
                rows = entity["rows"][entry["field"]][
                    :1
                ]  # the answer stands at the beginning of the field
                pools.setdefault(name, []).append(
                    {"query": CHECK_QUERIES[name].format(entity["title"]), "rows": rows}
                )
    return [
        check
        for pool in pools.values()
        for check in rng.sample(pool, min(len(pool), -(-count // len(pools))))
    ]


def write_index(path: Path, vectors: np.ndarray):
    """(N, d) float32 vectors to a FAISS flat inner-product index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    faiss.write_index(index, str(path))


def write_jsonl(path: Path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def fingerprint(entities: list[dict]) -> str:
    """Changes when an article, a relation, an image's size or RULES changes."""
    digest = hashlib.sha256(repr((RULES, MAX_WORDS, AUGMENTED)).encode())
    for entity in entities:
        digest.update(
            repr(
                [
                    (k, v.size if isinstance(v, Image.Image) else v)
                    for k, v in entity.items()
                    if k != "photos"
                ]
            ).encode()
        )
        digest.update(repr([(k, v.size) for k, v in entity["photos"].items()]).encode())
    return digest.hexdigest()


def build(out: Path, entities: list[dict] | None = None, say=print):
    """Build the knowledge base of the entities (by default, the atlas's) in `out`, unless the one there is of the same."""
    started = time.time()
    entities = read_atlas() if entities is None else entities
    mark = fingerprint(entities)
    if (out / "manifest.json").exists() and json.loads((out / "manifest.json").read_text()).get(
        "fingerprint"
    ) == mark:
        return say(f"{out} is up to date")
    if out.exists() and not (out / "manifest.json").exists():
        raise retrieval.KnowledgeBaseError(
            f"{out} exists and was not built by this command; name another folder with --out"
        )
    work = out.with_name(out.name + ".building")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    say(f"read {len(entities)} articles in {time.time() - started:.0f} s")

    # Pictures: the article's own, and others of the same thing.
    started, shown = time.time(), [entity for entity in entities if entity["image"]]
    encoder = AtlasImageEncoder()
    vectors = encoder.fit([entity["image"] for entity in shown], work / "encoders" / "image")
    (work / "images").mkdir()
    (work / "photos").mkdir()
    image_checks, augmented = (
        [],
        [
            disturb_all(augment, [entity["image"] for entity in shown], 1000 + i)
            for i in range(AUGMENTED)
        ],
    )
    for row, entity in enumerate(shown):
        entity["image"].save(work / "images" / f"{entity['id']}.png")
        photos = entity["photos"] | {
            f"augmented{i}": pictures[row] for i, pictures in enumerate(augmented)
        }
        for name, photo in photos.items():
            path = f"photos/{entity['id']}.{name}.png"
            photo.save(work / path)
            image_checks.append({"image": path, "kind": name.rstrip("0123456789"), "row": row})
    write_index(work / retrieval.IMAGE_INDEX, vectors)
    write_jsonl(
        work / retrieval.IMAGE_CORPUS,
        (
            {
                "id": row,
                "title": entity["title"],
                "entity_id": entity["id"],
                "image_path": f"images/{entity['id']}.png",
            }
            for row, entity in enumerate(shown)
        ),
    )
    say(
        f"fitted the image encoder and wrote {len(shown)} images and {len(image_checks)} photos in {time.time() - started:.0f} s"
    )

    # Passages.
    started, corpus = time.time(), []
    for entity in entities:
        entity["rows"] = {}
        for field, text in passages(entity["title"], entity["fields"].items()):
            entity["rows"].setdefault(field, []).append(len(corpus))
            corpus.append(f"{entity['title']}\n{text}")
    convert_e5(work / "encoders" / "text")
    vectors = retrieval.E5Encoder(work / "encoders" / "text").encode_passages(corpus, progress=True)
    write_index(work / retrieval.TEXT_INDEX, vectors)
    write_jsonl(
        work / retrieval.TEXT_CORPUS,
        ({"id": row, "contents": contents} for row, contents in enumerate(corpus)),
    )
    seconds = time.time() - started
    say(f"indexed {len(corpus)} passages in {seconds:.0f} s ({len(corpus) / seconds:.0f} a second)")

    write_jsonl(work / "check" / "text.jsonl", text_checks(entities))
    write_jsonl(work / "check" / "image.jsonl", image_checks)
    write_jsonl(
        work / "entities.jsonl",
        (
            {k: v for k, v in entity.items() if k not in ("fields", "photos", "image")}
            | {
                "image": f"images/{entity['id']}.png" if entity["image"] else None,
                "photos": {
                    Path(c["image"]).name.split(".")[-2]: c["image"]
                    for c in image_checks
                    if c["image"].startswith(f"photos/{entity['id']}.")
                },
            }
            for entity in entities
        ),
    )
    files = [
        retrieval.TEXT_INDEX,
        retrieval.TEXT_CORPUS,
        retrieval.IMAGE_INDEX,
        retrieval.IMAGE_CORPUS,
        Path("entities.jsonl"),
    ]
    write_json(
        work / "manifest.json",
        {
            "source": "atlas",
            "fingerprint": mark,
            "passages": len(corpus),
            "articles": len(entities),
            "images": len(shown),
            "encoders": {
                "text": {"kind": "e5", "name": "encoders/text", "dim": int(vectors.shape[1])},
                "image": {"kind": "atlas", "name": "encoders/image", "dim": 256},
            },
            "files": {
                str(file): {
                    "bytes": (work / file).stat().st_size,
                    "sha256": retrieval.checksum(work / file),
                }
                for file in files
            },
        },
    )
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)
    say(f"wrote {out}: {len(entities)} articles, {len(shown)} images, {len(corpus)} passages")


@dataclass
class Args:
    """Build a knowledge base: the embedded one, or that of another source."""

    out: Path = Path("data/kb")
    source: Literal["atlas", "evqa", "wiki6m", "searchr1", "markdown"] = "atlas"
    path: Path | None = None  # the source's file or folder
    images: Path | None = None  # evqa, wiki6m: where their pictures are
    text_encoder: str = "intfloat/e5-base-v2"  # Hugging Face name or folder of an E5
    image_encoder: str = "ViT-L-14-336"  # open_clip name or folder
    pretrained: str = "openai"  # weights of an open_clip name
    max_words: int = 100  # of a passage, its title included
    limit: int | None = None  # articles


def main(args: Args):
    if args.source == "atlas":
        return build(args.out)
    import torch

    import distributed
    from knowledge import index

    if args.path is None:
        raise DataError(f"--source {args.source} needs --path, its file or folder")
    atlas = (Path(args.image_encoder) / "head.safetensors").exists()
    picture_encoder = {"kind": "atlas" if atlas else "clip", "name": args.image_encoder} | (
        {} if atlas or Path(args.image_encoder).is_dir() else {"pretrained": args.pretrained}
    )

    distributed.start()
    try:
        index.build(
            args.source,
            args.path,
            args.out,
            args.images,
            {"text": {"kind": "e5", "name": args.text_encoder}, "image": picture_encoder},
            lambda title, sections: passages(title, sections, args.max_words),
            f"at most {args.max_words} words",
            args.limit,
            f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu",
            say=print if distributed.world()[0] == 0 else lambda *_: None,
        )
    finally:
        distributed.stop()


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (MissingSource, DataError, retrieval.KnowledgeBaseError) as error:
        sys.exit(f"error: {error}")
