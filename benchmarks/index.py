"""Indexing 100,000 articles of four passages and a picture each, with made-up vectors: time, memory, and three kills.

    python benchmarks/index.py                     # about three minutes and 4 GB of disk
    python benchmarks/index.py --articles 5000

The path is that of `build_kb.py --source markdown`, only the encoders are replaced: a vector of 768 numbers drawn from the text's
checksum. The memory reported is what the process itself holds (RssAnon), sampled ten times a second; memory-mapped files
are not in it. Then eight processes open and search what was built. The second build is killed with SIGKILL while it writes rows, in the middle of the shards and while it
joins them; its indexes must be those of the first, byte for byte.
"""

import filecmp
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

import knowledge.index as indexing
import retrieval
from build_kb import passages


class MadeUp:
    """Vectors of unit length, each a function of its text alone."""

    def __init__(self, d: int = 768):
        self.d = d

    def encode_passages(self, texts):
        vectors = np.stack(
            [
                np.random.default_rng(zlib.crc32(text.encode())).standard_normal(
                    self.d, dtype=np.float32
                )
                for text in texts
            ]
        )
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def index_vectors(self, images, titles):
        return self.encode_passages(titles)


@dataclass
class Args:
    """Time and memory of indexing, and resuming after kills."""

    articles: int = 100_000
    out: Path = Path("runs/index")


def write_articles(folder: Path, count: int):
    for n in range(count):
        part = folder / f"{n // 1000:04d}"
        if n % 1000 == 0:
            part.mkdir(parents=True)
            Image.fromarray(
                np.random.default_rng(n).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            ).save(part / "picture.jpg")
        sections = "\n".join(
            f"## Section {s}\nArticle {n} says in section {s} that its number is {n * 7919 % 100_003}."
            for s in range(4)
        )
        (part / f"article-{n:06d}.md").write_text(
            f"# Article {n}\n![picture](picture.jpg)\n{sections}\n"
        )


def child(folder: Path, name: str):
    indexing.build(
        "markdown",
        folder / "articles",
        folder / name,
        None,
        {"text": {"kind": "e5", "name": "made up"}, "image": {"kind": "clip", "name": "made up"}},
        passages,
        "made up",
        load=lambda *_: MadeUp(),
    )


def reader(folder: Path):
    """Search a knowledge base as a rank does; prints what it holds for itself, and what it shares, in MB."""
    before = status("RssAnon")
    kb = retrieval.KnowledgeBase(
        retrieval.JsonLines(folder / retrieval.TEXT_CORPUS, "contents"),
        faiss_index(folder, retrieval.TEXT_INDEX, retrieval.TEXT_CORPUS),
        None,
        retrieval.JsonLines(folder / retrieval.IMAGE_CORPUS),
        faiss_index(folder, retrieval.IMAGE_INDEX, retrieval.IMAGE_CORPUS),
        None,
    )
    for index in (kb.text_index, kb.image_index):
        retrieval.search(index, MadeUp().encode_passages(["one", "two"]), 3)
    print(
        f"{status('RssAnon') - before:.0f} {status('RssAnon'):.0f} {status('RssFile'):.0f}",
        flush=True,
    )
    sys.stdin.readline()


def faiss_index(folder: Path, index: Path, corpus: Path):
    return retrieval.open_index(folder / index, sum(1 for _ in open(folder / corpus)), corpus)


def status(name: str, pid: str = "self") -> float:
    return next(
        int(line.split()[1]) / 1024 for line in open(f"/proc/{pid}/status") if line.startswith(name)
    )


def run(folder: Path, name: str, until=None) -> tuple[float, float]:
    """(seconds, greatest RssAnon in MB) of a build, killed as soon as until() holds."""
    process, began, most = (
        subprocess.Popen(
            [sys.executable, __file__, "child", str(folder), name],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ),
        time.time(),
        0.0,
    )
    while process.poll() is None:
        try:
            most = max(most, status("RssAnon", process.pid))
        except (StopIteration, OSError):
            pass
        if until and until():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return time.time() - began, most
        time.sleep(0.1)
    assert process.returncode == 0, f"the build of {name} failed"
    return time.time() - began, most


def main(args: Args):
    folder = ROOT / args.out
    shutil.rmtree(folder, ignore_errors=True)
    began = time.time()
    write_articles(folder / "articles", args.articles)
    print(f"wrote {args.articles} articles in {time.time() - began:.0f} s", flush=True)
    seconds, memory = run(folder, "whole")
    sizes = [
        (folder / "whole" / file).stat().st_size / 1e9
        for file in (retrieval.TEXT_INDEX, retrieval.IMAGE_INDEX)
    ]
    print(
        f"built in {seconds:.0f} s, {memory:.0f} MB at most; indexes of {sizes[0]:.2f} and {sizes[1]:.2f} GB",
        flush=True,
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "reader", str(folder / "whole")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    held = [list(map(float, rank.stdout.readline().split())) for rank in ranks]
    for rank in ranks:
        rank.communicate("\n")
    print(
        f"eight processes open and search it: {max(more for more, *_ in held):.0f} MB of its own for each (of {max(own for _, own, _ in held):.0f} with Python and its libraries); "
        f"{min(file for *_, file in held):.0f} MB each are the same mapped files",
        flush=True,
    )
    work = folder / "cut.building"
    half = args.articles * 4 // indexing.SHARD // 2
    for what, until in (
        ("writing rows", lambda: (work / retrieval.TEXT_CORPUS).exists()),
        ("encoding", lambda: len(list((work / "shards").glob("text-*"))) >= half),
        (
            "joining",
            lambda: (
                any(work.rglob("*.part"))
                and (work / "shards").exists()
                and len(list((work / "shards").glob("image-*"))) >= args.articles // indexing.SHARD
            ),
        ),
    ):
        seconds, _ = run(folder, "cut", until)
        print(f"killed while {what}, after {seconds:.0f} s", flush=True)
    run(folder, "cut")
    same = all(
        filecmp.cmp(folder / "whole" / file, folder / "cut" / file, shallow=False)
        for file in (
            retrieval.TEXT_INDEX,
            retrieval.TEXT_CORPUS,
            retrieval.IMAGE_INDEX,
            retrieval.IMAGE_CORPUS,
        )
    )
    print(f"indexes and corpora are {'identical' if same else 'DIFFERENT'}")
    shutil.rmtree(folder)
    sys.exit(not same)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), sys.argv[3])
    elif sys.argv[1:2] == ["reader"]:
        reader(Path(sys.argv[2]))
    else:
        import tyro

        main(tyro.cli(Args))
