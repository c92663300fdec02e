"""Is a knowledge base whole, and how often do its searches find the right thing?

    python -m knowledge.check --kb data/kb

The checks were written beside it when it was built, if at all:

    check/text.jsonl     {"query", "rows": the passages that answer it}
    check/image.jsonl    {"image", "kind", "row": the article it shows}

Some rows of both indexes are encoded again. A cosine below 0.999 means that another encoder made
the index; CLIP is tried with both of its activations.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files.images import open_image
from files.records import FAULTS, checksum, read_lines
from files.terminal import fail
from retrieval import PUBLISHED, KnowledgeBase, KnowledgeBaseError, load_encoder, read_manifest

AGAIN = 32  # rows of each index that are encoded again
SAME = 0.999  # least cosine of a vector with the one in the index


def check(folder: Path) -> dict:
    """{name: figure}: counts, whether the checksums match, and recall R@k on the checks.

    Raises KnowledgeBaseError when a file is not the one that the manifest describes.
    """
    kb = KnowledgeBase.open(folder)
    files = read_manifest(folder).get("files", {})
    for name, entry in files.items():
        if checksum(folder / name) != entry["sha256"]:
            raise KnowledgeBaseError(
                f"{folder / name} is not the file the manifest describes: "
                "build or download the folder again"
            )
    result = {
        "passages": len(kb.texts),
        "articles_with_image": len(kb.records),
        "checksums": "match" if files else "none given",
    }
    for name, index in (("text", kb.text_index), ("image", kb.image_index)):
        refuse_not_finite(index, f"the {name} index of {folder}")
    result |= texts_again(kb) | images_again(kb, folder)
    if (folder / "check" / "text.jsonl").exists():
        result |= text_recall(kb, read_lines(folder / "check" / "text.jsonl"))
    if (folder / "check" / "image.jsonl").exists():
        result |= image_recall(kb, read_lines(folder / "check" / "image.jsonl"), folder)
    return result


def refuse_not_finite(index, name: str, at_once: int = 100_000):
    """Raises KnowledgeBaseError, naming the first row, where a flat index holds a vector that
    cannot be compared: its passage is never found."""
    if not hasattr(index, "codes"):
        return
    for start in range(0, index.ntotal, at_once):
        vectors = index.reconstruct_n(start, min(at_once, index.ntotal - start))  # (N, d)
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            raise KnowledgeBaseError(
                f"{name} holds a vector that is not finite, row {start + bad[0]}: build it again"
            )


def some_rows(index) -> list[int]:
    """At most AGAIN rows, evenly drawn."""
    return np.linspace(0, index.ntotal - 1, min(AGAIN, index.ntotal)).astype(int).tolist()


def least_cosine(index, rows: list[int], vectors: np.ndarray) -> float:
    """Of vectors (N, d), encoded again, with those that the index holds of these rows.

    Raises KnowledgeBaseError where they differ in their dimensions.
    """
    if vectors.shape[1] != index.d:
        raise KnowledgeBaseError(
            f"the encoder gives {vectors.shape[1]} dimensions, the index holds {index.d}: "
            "it was built with another encoder"
        )
    held = np.stack([index.reconstruct(row) for row in rows])
    norms = np.linalg.norm(held, axis=1) * np.linalg.norm(vectors, axis=1)
    return float(((held * vectors).sum(1) / norms).min())


def texts_again(kb: KnowledgeBase) -> dict:
    """{name: least cosine} of passages encoded again. An index that is compressed is less near."""
    rows = some_rows(kb.text_index)
    if not hasattr(kb.text_index, "codes"):  # not flat: what it holds is not what was encoded
        return {}
    vectors = kb.text_encoder.encode_passages([kb.texts[row] for row in rows])
    cosine = least_cosine(kb.text_index, rows, vectors)
    return {f"text encoded again, cosine (n={len(rows)})": round(cosine, 5)}


def images_again(kb: KnowledgeBase, folder: Path) -> dict:
    """{name: least cosine} of articles' images encoded again, with their titles where the encoder
    reads titles: by CLIP with either activation, and then which of them made the index."""
    rows = [row for row in some_rows(kb.image_index) if picture_of(kb, folder, row).exists()]
    if not rows:
        return {"image encoded again": "none of the pictures is here"}
    spec = read_manifest(folder).get("encoders", PUBLISHED)["image"]
    specs = {"image": spec}
    if spec["kind"] == "clip":
        names = {"image, GELU": False, "image, QuickGELU": True}
        specs = {name: spec | {"quick_gelu": quick} for name, quick in names.items()}
    images = [open_image(picture_of(kb, folder, row)) for row in rows]
    titles = [kb.records[row]["title"] for row in rows]
    cosines = {}
    for name, tried in specs.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "QuickGELU mismatch")  # it is what is measured
            encoder = load_encoder(tried, folder, "cpu")
        if hasattr(encoder, "index_vectors"):
            vectors = encoder.index_vectors(images, titles)
        else:
            vectors = encoder.encode_images(images)
        cosines[name] = least_cosine(kb.image_index, rows, vectors)
    result = {
        f"{name} encoded again, cosine (n={len(rows)})": round(cosine, 5)
        for name, cosine in cosines.items()
    }
    if len(specs) > 1:
        result["CLIP's activation"] = activation(cosines, specs, spec, folder)
    return result


def picture_of(kb: KnowledgeBase, folder: Path, row: int) -> Path:
    """The file of an article's image: by its full path, or within the folder."""
    return folder / str(kb.records[row]["image_path"])


def activation(cosines: dict, specs: dict, used: dict, folder: Path) -> str:
    """Which activation made the index; and, where searches use the other, what to write down."""
    best = max(cosines, key=cosines.get)
    name = best.removeprefix("image, ")
    if cosines[best] < SAME:
        return "neither made this index: its weights or its pictures are others"
    if specs[best]["quick_gelu"] == used.get("quick_gelu", False):
        return f"{name}, as searches use"
    encoders = read_manifest(folder).get("encoders", PUBLISHED) | {"image": specs[best]}
    return (
        f"{name} made this index, but searches use the other; in {folder / 'manifest.json'} write "
        + json.dumps({"encoders": encoders})
    )


def text_recall(kb: KnowledgeBase, checks: list[dict]) -> dict:
    """R@k: the share of queries with an answering passage among the first k."""
    found = kb.text_search([check["query"] for check in checks], 3)
    result = {}
    for k in (1, 2, 3):
        right = [
            any(hit.row in check["rows"] for hit in hits[:k]) for check, hits in zip(checks, found)
        ]
        result[f"text R@{k} (n={len(checks)})"] = round(float(np.mean(right)), 4)
    return result


def image_recall(kb: KnowledgeBase, checks: list[dict], folder: Path) -> dict:
    """R@1 of every kind of picture: the share whose nearest article is the one it shows."""
    found = kb.image_search([folder / check["image"] for check in checks], 1)
    right = {}  # kind → [was the article found?]
    for check, hits in zip(checks, found):
        right.setdefault(check["kind"], []).append(hits[0].row == check["row"])
    return {
        f"image R@1 {kind} (n={len(of_kind)})": round(float(np.mean(of_kind)), 4)
        for kind, of_kind in right.items()
    }


@dataclass
class Args:
    """Verify a knowledge base and print how often its retrievers find the right thing."""

    kb: Path = Path("data/kb")


def main(args: Args):
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title=f"retrieval over {args.kb}")
    for name, value in check(args.kb).items():
        table.add_row(name, str(value))
    Console().print(table)


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except FAULTS as error:
        fail(error)
