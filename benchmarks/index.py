"""Indexing 100,000 articles of four passages and a picture each: time, memory, and three kills.

    python benchmarks/index.py                     # about three minutes and 4 GB of disk
    python benchmarks/index.py --articles 5000

The path is that of `build_kb.py --source markdown`; only the encoders are replaced, by vectors of
768 numbers that are drawn from the text's checksum. Then eight processes open and search what was
built. A second build is killed with SIGKILL while it writes rows, while it encodes and while it
joins the shards; its indexes must be those of the first, byte for byte.
"""

import filecmp
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

import knowledge.index as indexing
import retrieval
from files.rows import JsonLines
from knowledge.pieces import splitter

READERS = 8
SECTIONS = 4  # passages per article


@dataclass
class Args:
    """Time and memory of indexing, and resuming after kills."""

    articles: int = 100_000
    out: Path = Path("runs/index")


# --------------------------------------------------------------------------- what is indexed


class MadeUp:
    """Vectors of unit length, each a function of its text alone."""

    def __init__(self, d: int = 768):
        self.d = d

    def encode_passages(self, texts):
        vectors = np.stack([self.vector(text) for text in texts])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def index_vectors(self, images, titles):
        return self.encode_passages(titles)

    def vector(self, text: str) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(text.encode()))
        return rng.standard_normal(self.d, dtype=np.float32)


def write_articles(folder: Path, count: int):
    """Markdown files, a thousand in a folder, which share its picture."""
    for n in range(count):
        part = folder / f"{n // 1000:04d}"
        if n % 1000 == 0:
            part.mkdir(parents=True)
            pixels = np.random.default_rng(n).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(part / "picture.jpg")
        number = n * 7919 % 100_003
        sections = "\n".join(
            f"## Section {s}\nArticle {n} says in section {s} that its number is {number}."
            for s in range(SECTIONS)
        )
        text = f"# Article {n}\n![picture](picture.jpg)\n{sections}\n"
        (part / f"article-{n:06d}.md").write_text(text)


# --------------------------------------------------------------------------- processes of their own


def build(folder: Path, name: str):
    """What a child process does: build the knowledge base FOLDER/NAME of FOLDER/articles."""
    models = {
        "text": {"kind": "e5", "name": "made up"},
        "image": {"kind": "clip", "name": "made up"},
    }
    indexing.build(
        "markdown",
        folder / "articles",
        folder / name,
        None,
        models,
        splitter("words:48"),
        "made up",
        load=lambda *_: MadeUp(),
    )


def read(folder: Path):
    """Search a knowledge base as a rank does, and stay until a line comes in. Prints, in MB, what
    opening it took, what the process holds for itself, and what it maps from files."""
    before = memory("RssAnon")
    kb = retrieval.KnowledgeBase(
        JsonLines(folder / retrieval.TEXT_CORPUS, "contents"),
        open_index(folder, retrieval.TEXT_INDEX, retrieval.TEXT_CORPUS),
        None,
        JsonLines(folder / retrieval.IMAGE_CORPUS),
        open_index(folder, retrieval.IMAGE_INDEX, retrieval.IMAGE_CORPUS),
        None,
    )
    for index in (kb.text_index, kb.image_index):
        retrieval.search(index, MadeUp().encode_passages(["one", "two"]), 3)
    own, mapped = memory("RssAnon"), memory("RssFile")
    print(f"{own - before:.0f} {own:.0f} {mapped:.0f}", flush=True)
    sys.stdin.readline()


def open_index(folder: Path, index: Path, corpus: Path):
    with open(folder / corpus) as file:
        rows = sum(1 for _ in file)
    return retrieval.open_index(folder / index, rows, corpus)


def memory(name: str, pid: str | int = "self") -> float:
    """MB of a process, by Linux: "RssAnon" is what it holds itself, "RssFile" what it maps."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))


def run_build(folder: Path, name: str, until=None) -> tuple[float, float]:
    """(seconds, greatest RssAnon in MB, looked at ten times per second) of a build in a process of
    its own, killed as soon as until() holds."""
    began = time.time()
    most = 0.0
    process = subprocess.Popen(
        [sys.executable, __file__, "child", str(folder), name],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        with suppress(StopIteration, OSError):  # it may just have ended
            most = max(most, memory("RssAnon", process.pid))
        if until and until():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return time.time() - began, most
        time.sleep(0.1)
    assert process.returncode == 0, f"the build of {name} failed"
    return time.time() - began, most


# --------------------------------------------------------------------------- the benchmark


def measure_build(folder: Path):
    seconds, most = run_build(folder, "whole")
    text, image = (
        (folder / "whole" / file).stat().st_size / 1e9
        for file in (retrieval.TEXT_INDEX, retrieval.IMAGE_INDEX)
    )
    print(
        f"built in {seconds:.0f} s, {most:.0f} MB at most; "
        f"indexes of {text:.2f} and {image:.2f} GB",
        flush=True,
    )


def measure_readers(folder: Path):
    """Memory of several processes that have the same knowledge base open at once."""
    readers = [
        subprocess.Popen(
            [sys.executable, __file__, "reader", str(folder / "whole")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(READERS)
    ]
    lines = [reader.stdout.readline() for reader in readers]  # all are open now
    for reader in readers:
        reader.communicate("\n")
    opening, own, mapped = zip(*(map(float, line.split()) for line in lines))
    print(
        f"{READERS} processes open and search it: {max(opening):.0f} MB of its own for each "
        f"(of {max(own):.0f} with Python and its libraries); "
        f"{min(mapped):.0f} MB each are the same mapped files",
        flush=True,
    )


def kill_three_times(folder: Path, articles: int):
    """Build FOLDER/cut, killed at three stages, then to the end."""
    work = folder / "cut.building"
    text_shards = articles * SECTIONS // indexing.SHARD
    image_shards = articles // indexing.SHARD

    def shards(kind: str) -> int:
        return len(list((work / "shards").glob(f"{kind}-*")))

    def writing_rows() -> bool:
        return (work / retrieval.TEXT_CORPUS).exists()

    def encoding() -> bool:
        return shards("text") >= text_shards // 2

    def joining() -> bool:
        started = any(work.rglob("*.part")) and (work / "shards").exists()
        return started and shards("image") >= image_shards

    stages = {"writing rows": writing_rows, "encoding": encoding, "joining": joining}
    for stage, reached in stages.items():
        seconds, _ = run_build(folder, "cut", until=reached)
        print(f"killed while {stage}, after {seconds:.0f} s", flush=True)
    run_build(folder, "cut")


def main(args: Args):
    folder = ROOT / args.out
    shutil.rmtree(folder, ignore_errors=True)
    began = time.time()
    write_articles(folder / "articles", args.articles)
    print(f"wrote {args.articles} articles in {time.time() - began:.0f} s", flush=True)

    measure_build(folder)
    measure_readers(folder)
    kill_three_times(folder, args.articles)

    files = (
        retrieval.TEXT_INDEX,
        retrieval.TEXT_CORPUS,
        retrieval.IMAGE_INDEX,
        retrieval.IMAGE_CORPUS,
    )
    same = all(
        filecmp.cmp(folder / "whole" / file, folder / "cut" / file, shallow=False) for file in files
    )
    print(f"indexes and corpora are {'identical' if same else 'DIFFERENT'}")
    shutil.rmtree(folder)
    sys.exit(not same)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        build(Path(sys.argv[2]), sys.argv[3])
    elif sys.argv[1:2] == ["reader"]:
        read(Path(sys.argv[2]))
    else:
        import tyro

        main(tyro.cli(Args))
