"""Is a knowledge base whole, and how often do its searches find the right thing?

    python -m knowledge.check --kb data/kb

The checks were written beside it when it was built, if at all:

    check/text.jsonl     {"query", "rows": the passages that answer it}
    check/image.jsonl    {"image", "kind", "row": the article it shows}
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files.records import checksum, read_lines
from retrieval import KnowledgeBase, KnowledgeBaseError, read_manifest


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
    if (folder / "check" / "text.jsonl").exists():
        result |= text_recall(kb, read_lines(folder / "check" / "text.jsonl"))
    if (folder / "check" / "image.jsonl").exists():
        result |= image_recall(kb, read_lines(folder / "check" / "image.jsonl"), folder)
    return result


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
    except (KnowledgeBaseError, ValueError) as error:
        sys.exit(f"error: {error}")
