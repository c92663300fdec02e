"""The folder of a knowledge base while it is built: what is to do, its manifest, its name.

A folder is built as OUT.building and gets its name when it is complete, so a killed run leaves
nothing that could be mistaken for a knowledge base.
"""

import os
import shutil
from pathlib import Path

from files.records import checksum, write_json
from retrieval import KnowledgeBaseError, read_manifest


def is_current(out: Path, fingerprint: str) -> bool:
    """Whether `out` was built from what has this fingerprint. Raises KnowledgeBaseError where the
    folder exists without a manifest of ours: it is somebody's, and is not overwritten."""
    ours = (out / "manifest.json").exists() and "fingerprint" in read_manifest(out)
    if out.exists() and not ours:
        raise KnowledgeBaseError(
            f"{out} exists and was not built by this command; name another folder with --out"
        )
    return read_manifest(out).get("fingerprint") == fingerprint


def building(out: Path) -> Path:
    """Where `out` is built."""
    return out.with_name(out.name + ".building")


def write_manifest(
    work: Path, source: str, fingerprint: str, counts: dict, encoders: dict, files: list[Path]
):
    """counts: {"passages", "articles", "images"}; files: those whose size and checksum are kept."""
    described = {
        str(file): {"bytes": (work / file).stat().st_size, "sha256": checksum(work / file)}
        for file in files
    }
    manifest = {
        "source": source,
        "fingerprint": fingerprint,
        "passages": counts["passages"],
        "articles": counts["articles"],
        "images": counts["images"],
        "encoders": encoders,
        "files": described,
    }
    write_json(work / "manifest.json", manifest)


def publish(work: Path, out: Path):
    """Give the finished folder its name, in place of the one that was there.

    A kill in between leaves both whole, one of them under another name.
    """
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(work, out)
    shutil.rmtree(old, ignore_errors=True)
