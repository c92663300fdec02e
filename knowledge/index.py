"""Index a corpus of any size: articles to passages, passages to vectors, vectors to FAISS indexes.

    python build_kb.py --source wiki6m --path Wiki6M_ver_1_0.jsonl.gz --out data/wiki
    torchrun --nproc_per_node 8 build_kb.py --source evqa --path encyclopedic_kb_wiki.json \\
        --images kb-images --out data/evqa-kb

OUT.building keeps what is done: the same command after a kill goes on with the shards that are
missing. Memory never holds more than a shard.
"""

import hashlib
import json
import os
import shutil
from itertools import islice
from pathlib import Path

import faiss
import numpy as np
from PIL import Image
from tqdm import tqdm

import retrieval
from engine.distributed import barrier, world
from files.images import FORMATS, MOST_PIXELS, open_image
from files.records import write_json
from files.rows import JsonLines
from knowledge.corpora import read_articles
from knowledge.folder import building, is_current, publish, write_manifest

SHARD = 4096  # rows that are encoded at a time
PICTURES_PER_BATCH = 64
SAMPLE = 2**20  # rows that an index is trained on


def write_rows(work: Path, articles, split) -> dict:
    """Stream articles into the two corpora; a row's place is its id. Returns the counts.

    split: (title, sections) → [(heading, text)].
    """
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
                row = {"id": counts["passages"], "contents": f"{article.title}\n{text}"}
                texts.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts["passages"] += 1
            if article.image is None:
                continue
            if not is_readable(article.image):
                counts["unreadable_images"] += 1
                continue
            row = {
                "id": counts["images"],
                "title": article.title,
                "entity_id": article.id,
                "image_path": str(article.image.resolve()),
            }
            images.write(json.dumps(row, ensure_ascii=False) + "\n")
            counts["images"] += 1
    return counts


def is_readable(path: Path) -> bool:
    """Read to its end: a picture that is cut short would end the build at its shard."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            small_enough = image.width * image.height <= MOST_PIXELS
            image.draft("RGB", (64, 64))  # of a JPEG an eighth is decoded
            if small_enough:
                image.load()
    except Exception:
        return False
    return small_enough


def shard_file(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:06d}.npy"


def count_shards(rows: int) -> int:
    return -(-rows // SHARD)


def encode_shards(folder: Path, name: str, rows, encode):
    """Encode this rank's part of the missing shards.

    rows: anything with len and [i]. encode: list of rows → (N, d) float32. A shard is written
    under another name and then renamed, so a shard that is there is whole.
    """
    rank, ranks = world()
    folder.mkdir(parents=True, exist_ok=True)
    # dealt by number: what is missing another rank may see at another time
    mine = range(rank, count_shards(len(rows)), ranks)
    missing = [number for number in mine if not shard_file(folder, name, number).exists()]
    for number in tqdm(missing, desc=f"{name} shards", disable=rank > 0):
        end = min((number + 1) * SHARD, len(rows))
        vectors = encode([rows[i] for i in range(number * SHARD, end)])  # (N, d)
        part = folder / f".{name}-{number:06d}.{rank}.npy"
        with open(part, "wb") as file:
            np.save(file, np.ascontiguousarray(vectors, dtype=np.float32))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, shard_file(folder, name, number))


def join_shards(folder: Path, name: str, rows: int, path: Path) -> int:
    """Write the flat inner-product index of all shards; returns the dimension d.

    Such an index is a short header and the vectors, one after another. It is written that way,
    shard by shard, and is byte for byte what `faiss.write_index` writes.
    """
    shards = [shard_file(folder, name, number) for number in range(count_shards(rows))]
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


def compress_shards(
    folder: Path, name: str, rows: int, path: Path, kind: str, sample: int = SAMPLE
) -> int:
    """Write an index that is not flat, by FAISS's name of it ("IVF4096,PQ64"); returns d.

    It is trained on at most `sample` rows, evenly drawn, and filled shard by shard. Raises
    KnowledgeBaseError where FAISS does not know such an index, or the rows are too few for it.
    """
    shards = [shard_file(folder, name, number) for number in range(count_shards(rows))]
    d = np.load(shards[0], mmap_mode="r").shape[1]
    every = -(-rows // sample)
    drawn = np.concatenate([np.load(shard, mmap_mode="r")[::every] for shard in shards])
    try:
        index = faiss.index_factory(d, kind, faiss.METRIC_INNER_PRODUCT)
        index.train(np.ascontiguousarray(drawn, dtype=np.float32))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise retrieval.KnowledgeBaseError(
            f"--index {kind} cannot be made of {rows} vectors of {d} dimensions: {reason}"
        ) from None
    for shard in tqdm(shards, desc=kind):
        index.add(np.load(shard))
    path.parent.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(path.with_suffix(".part")))
    os.replace(path.with_suffix(".part"), path)
    return d


def encode_pictures(encoder, records: list[dict]) -> np.ndarray:
    """(N, d) index vectors of articles' images: with the title where the encoder reads titles."""
    vectors = []
    for start in range(0, len(records), PICTURES_PER_BATCH):
        part = records[start : start + PICTURES_PER_BATCH]
        images = [open_image(record["image_path"]) for record in part]
        if hasattr(encoder, "index_vectors"):
            titles = [record["title"] for record in part]
            vectors.append(encoder.index_vectors(images, titles))
        else:
            vectors.append(encoder.encode_images(images))
    return np.concatenate(vectors)


def fingerprint(source, path: Path, images, encoders: dict, limit, rules: str) -> str:
    """Changes when the source, its size, the encoders or the way of cutting changes."""
    if path.is_file():
        size = path.stat().st_size
    else:
        size = sum(file.stat().st_size for file in path.rglob("*"))
    parts = (source, str(path.resolve()), size, str(images), encoders, limit, rules)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def set_nprobe(out: Path, nprobe: int):
    """How many cells a search visits: in the manifest alone, nothing is built again."""
    manifest = retrieval.read_manifest(out)
    if manifest["encoders"]["text"]["nprobe"] == nprobe:
        return
    manifest["encoders"]["text"]["nprobe"] = nprobe
    write_json(out / ".manifest.json", manifest)
    os.replace(out / ".manifest.json", out / "manifest.json")


def named(spec: dict, d: int) -> dict:
    """A manifest's entry of an encoder: a folder by its full path, and the dimension."""
    if Path(spec["name"]).is_dir():
        spec = spec | {"name": str(Path(spec["name"]).resolve())}
    return spec | {"dim": d}


def build(
    source: str,
    path: Path,
    out: Path,
    images: Path | None,
    encoders: dict,
    split,
    rules: str,
    limit: int | None = None,
    index: str = "Flat",
    nprobe: int = 32,
    device: str = "cpu",
    say=print,
    load=retrieval.load_encoder,
):
    """Build the folder `out`; under torchrun every rank calls it.

    encoders: the manifest's entries, {"text": {"kind", "name"}, "image": {…}}; names or folders.
    split: (title, sections) → [(heading, text)], how articles are cut; rules: what this is called
    in the fingerprint. limit: articles. index: of the passages, FAISS's name of it; nprobe: the
    cells that a search visits where it has cells. Raises KnowledgeBaseError where the source holds
    nothing or `out` was not built by this command.
    """
    rank, _ = world()
    flat = index == "Flat"
    rules = rules if flat else f"{rules} {index}"
    mark = fingerprint(source, path, images, encoders, limit, rules)
    current = is_current(out, mark)
    barrier()  # each rank has read it
    if current:
        if rank == 0 and "IVF" in index:
            set_nprobe(out, nprobe)
        # a kill just before the end leaves these
        shutil.rmtree(out / "shards", ignore_errors=True)
        (out / "rows.json").unlink(missing_ok=True)
        say(f"{out} is up to date")
        return
    work = building(out)
    shards = work / "shards"

    # 1) Rows: one pass over the source. rows.json says that it is done, and of what.
    done = work / "rows.json"
    if rank == 0 and (not done.exists() or json.loads(done.read_text())["fingerprint"] != mark):
        shutil.rmtree(work, ignore_errors=True)
        articles = islice(read_articles(source, path, images), limit)
        counts = write_rows(work, articles, split)
        if not counts["passages"]:
            raise retrieval.KnowledgeBaseError(f"{path} holds no articles of the kind {source!r}")
        done.with_suffix(".part").write_text(json.dumps(counts | {"fingerprint": mark}))
        os.replace(done.with_suffix(".part"), done)
    barrier()
    counts = json.loads(done.read_text())
    say(
        f"{counts['articles']} articles, {counts['passages']} passages, "
        f"{counts['images']} images ({counts['unreadable_images']} unreadable)"
    )

    # 2) Shards: ranks take them in turn.
    texts = JsonLines(work / retrieval.TEXT_CORPUS, "contents")
    records = JsonLines(work / retrieval.IMAGE_CORPUS)
    encoder = load(encoders["text"], work, device)
    encode_shards(shards, "text", texts, encoder.encode_passages)
    if len(records):
        encoder = load(encoders["image"], work, device)
        encode_shards(shards, "image", records, lambda rows: encode_pictures(encoder, rows))
    barrier()

    # 3) Indexes and manifest; then the folder gets its name.
    if rank == 0:
        given = (shards, "text", len(texts), work / retrieval.TEXT_INDEX)
        text_d = join_shards(*given) if flat else compress_shards(*given, index)
        image_d = join_shards(shards, "image", len(records), work / retrieval.IMAGE_INDEX)
        entries = {
            "text": named(encoders["text"], text_d) | {"dtype": retrieval.passage_dtype(device)},
            "image": {"kind": "none", "name": "", "dim": 1},
        }
        if not flat:
            entries["text"] |= {"index": index, "nprobe": nprobe if "IVF" in index else 0}
        if len(records):
            entries["image"] = named(encoders["image"], image_d)
        write_manifest(work, source, mark, counts, entries, retrieval.FILES)
        publish(work, out)
        shutil.rmtree(out / "shards")
        (out / done.name).unlink()
        say(f"wrote {out}")
    barrier()
