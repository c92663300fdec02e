"""Index a corpus of any size: stream its articles to passages, encode them in shards, join the shards into FAISS indexes.

    python build_kb.py --source wiki6m --path Wiki6M_ver_1_0.jsonl.gz --images wikipedia_images_full --out data/wiki
    torchrun --nproc_per_node 8 build_kb.py --source evqa --path encyclopedic_kb_wiki.json --out data/evqa-kb

1. **Rows.** One pass over the source writes `text_corpus.jsonl` and `image_corpus.jsonl`; a row's place is its id.
2. **Shards.** 4,096 rows are encoded at a time into `shards/text-000012.npy`. Ranks take shards in turn; each is written
   under another name and renamed, so a shard that is there is whole.
3. **Indexes.** A flat index on disk is a short header and the vectors, one after another. It is written that way, shard by
   shard, and is byte for byte what `faiss.write_index` writes. Memory never holds more than a shard.

OUT.building keeps what is done: the same command after a kill goes on with the shards that are missing.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import faiss
import numpy as np
from PIL import Image
from tqdm import tqdm

import retrieval
from distributed import barrier, world
from knowledge.corpora import read_articles

SHARD = 4096


def write_rows(work: Path, articles, split) -> dict:
    """Stream articles into the two corpora. split: (title, sections) → [(heading, text)]. Returns the counts."""
    (work / "text").mkdir(parents=True, exist_ok=True)
    (work / "image").mkdir(exist_ok=True)
    counts = {"articles": 0, "passages": 0, "images": 0, "unreadable_images": 0}
    with (
        open(work / retrieval.TEXT_CORPUS, "w", encoding="utf-8") as texts,
        open(work / retrieval.IMAGE_CORPUS, "w", encoding="utf-8") as images,
    ):
        for article in tqdm(articles, desc="articles", unit=""):
            counts["articles"] += 1
            pieces = article.sections if article.whole else split(article.title, article.sections)
            for _, text in pieces:
                texts.write(
                    json.dumps(
                        {"id": counts["passages"], "contents": f"{article.title}\n{text}"},
                        ensure_ascii=False,
                    )
                    + "\n"
                )
                counts["passages"] += 1
            if article.image:
                try:
                    with Image.open(article.image) as image:
                        image.verify()
                except Exception:
                    counts["unreadable_images"] += 1
                    continue
                images.write(
                    json.dumps(
                        {
                            "id": counts["images"],
                            "title": article.title,
                            "entity_id": article.id,
                            "image_path": str(article.image.resolve()),
                        },
                        ensure_ascii=False,
                    )
                    + "\n"
                )
                counts["images"] += 1
    return counts


def encode_shards(folder: Path, name: str, rows, encode):
    """Encode this rank's missing shards of `rows` (anything with len and slices by index); encode: list of rows → (N, d) float32."""
    rank, ranks = world()
    folder.mkdir(parents=True, exist_ok=True)
    todo = [
        n for n in range(-(-len(rows) // SHARD)) if not (folder / f"{name}-{n:06d}.npy").exists()
    ]
    for n in tqdm(todo[rank::ranks], desc=f"{name} shards", disable=rank > 0):
        part = folder / f".{name}-{n:06d}.{rank}.npy"
        vectors = encode([rows[i] for i in range(n * SHARD, min((n + 1) * SHARD, len(rows)))])
        with open(part, "wb") as file:
            np.save(file, np.ascontiguousarray(vectors, dtype=np.float32))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, folder / f"{name}-{n:06d}.npy")


def join_shards(folder: Path, name: str, rows: int, path: Path) -> int:
    """Write the flat inner-product index of all shards; returns the dimension. The file equals faiss.write_index's."""
    shards = [folder / f"{name}-{n:06d}.npy" for n in range(-(-rows // SHARD))]
    d = np.load(shards[0], mmap_mode="r").shape[1] if shards else 1
    header = bytearray(faiss.serialize_index(faiss.IndexFlatIP(d)).tobytes())
    header[8:16] = np.int64(rows).tobytes()  # ntotal, after a four-letter code and d
    header[-8:] = np.uint64(rows * d).tobytes()  # how many floats follow
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".part"), "wb") as file:
        file.write(header)
        for shard in shards:
            np.load(shard, mmap_mode="r").tofile(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".part"), path)
    return d


def encode_pictures(encoder, records: list[dict]) -> np.ndarray:
    """(N, d) index vectors of articles' images: with the title where the encoder reads titles."""
    out = []
    for start in range(0, len(records), 64):
        part = records[start : start + 64]
        images = [retrieval.open_image(record["image_path"]) for record in part]
        out.append(
            encoder.index_vectors(images, [record["title"] for record in part])
            if hasattr(encoder, "index_vectors")
            else encoder.encode_images(images)
        )
    return np.concatenate(out)


def build(
    source: str,
    path: Path,
    out: Path,
    images: Path | None,
    encoders: dict,
    split,
    rules: str,
    limit: int | None = None,
    device: str = "cpu",
    say=print,
    load=retrieval.load_encoder,
):
    """Build the folder `out`. encoders: the manifest's entries, {"text": {"kind", "name"}, "image": {…}}; names may be folders.
    split: (title, sections) → [(heading, text)], how articles are cut; rules: what it is called in the fingerprint."""
    rank, _ = world()
    size = (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*"))
    )
    mark = hashlib.sha256(
        repr((source, str(path.resolve()), size, str(images), encoders, limit, rules)).encode()
    ).hexdigest()
    manifest, work = out / "manifest.json", out.with_name(out.name + ".building")
    if manifest.exists() and json.loads(manifest.read_text()).get("fingerprint") == mark:
        return say(f"{out} is up to date")
    if out.exists() and not manifest.exists():
        raise retrieval.KnowledgeBaseError(
            f"{out} exists and was not built by this command; name another folder with --out"
        )
    done = work / "rows.json"
    if rank == 0:
        if not done.exists() or json.loads(done.read_text())["fingerprint"] != mark:
            shutil.rmtree(work, ignore_errors=True)
            articles = read_articles(source, path, images)
            counts = write_rows(
                work,
                articles if limit is None else (a for _, a in zip(range(limit), articles)),
                split,
            )
            if not counts["passages"]:
                raise retrieval.KnowledgeBaseError(
                    f"{path} holds no articles of the kind {source!r}"
                )
            done.with_suffix(".part").write_text(json.dumps(counts | {"fingerprint": mark}))
            os.replace(done.with_suffix(".part"), done)
    barrier()
    counts = json.loads(done.read_text())
    say(
        f"{counts['articles']} articles, {counts['passages']} passages, {counts['images']} images ({counts['unreadable_images']} unreadable)"
    )
    texts, records = (
        retrieval.JsonLines(work / retrieval.TEXT_CORPUS, "contents"),
        retrieval.JsonLines(work / retrieval.IMAGE_CORPUS),
    )
    encoder = load(encoders["text"], work, device)
    encode_shards(work / "shards", "text", texts, encoder.encode_passages)
    if len(records):
        encoder = load(encoders["image"], work, device)
        encode_shards(
            work / "shards", "image", records, lambda rows: encode_pictures(encoder, rows)
        )
    barrier()
    if rank == 0:
        dims = {
            "text": join_shards(work / "shards", "text", len(texts), work / retrieval.TEXT_INDEX),
            "image": join_shards(
                work / "shards", "image", len(records), work / retrieval.IMAGE_INDEX
            ),
        }
        named = {
            part: {
                k: str(Path(v).resolve()) if k == "name" and Path(v).is_dir() else v
                for k, v in spec.items()
            }
            | {"dim": dims[part]}
            for part, spec in encoders.items()
        }
        files = [
            retrieval.TEXT_INDEX,
            retrieval.TEXT_CORPUS,
            retrieval.IMAGE_INDEX,
            retrieval.IMAGE_CORPUS,
        ]
        (work / "manifest.json").write_text(
            json.dumps(
                {
                    "source": source,
                    "fingerprint": mark,
                    **{k: counts[k] for k in ("passages", "articles", "images")},
                    "encoders": named
                    if len(records)
                    else {"text": named["text"], "image": {"kind": "none", "name": "", "dim": 1}},
                    "files": {
                        str(file): {
                            "bytes": (work / file).stat().st_size,
                            "sha256": retrieval.checksum(work / file),
                        }
                        for file in files
                    },
                },
                indent=1,
            )
        )
        shutil.rmtree(work / "shards")
        done.unlink()
        shutil.rmtree(out, ignore_errors=True)
        os.replace(work, out)
        say(f"wrote {out}")
    barrier()
