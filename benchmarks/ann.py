"""Indexes that are smaller than their vectors: what they find, weigh and take.

    python -m benchmarks.ann --sizes 100000 1000000
    python -m benchmarks.ann --sizes 10000000 --kinds Flat IVF16384,PQ64 --work /tmp/vectors

The vectors are made up, with the mean and the covariance of the built-in knowledge base's passages;
queries lie as near to a passage as real ones do. They have no clusters, as real passages do, so an
index with cells finds less here than it would. Vectors lie in a file in WORK, and are read from it.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from retrieval import TEXT_INDEX

CHUNK = 100_000  # vectors that are made, or added, at once
K = 3


@dataclass
class Args:
    """Recall, memory and speed of indexes."""

    sizes: tuple[int, ...] = (100_000, 1_000_000)
    # N is replaced by four times the square root of the size, a usual number of cells
    kinds: tuple[str, ...] = ("Flat", "SQ8", "IVFN,Flat", "IVFN,SQ8", "IVFN,PQ96", "IVFN,PQ64")
    nprobes: tuple[int, ...] = (16, 64)  # cells that a search visits
    queries: int = 500
    kb: Path = Path("data/kb")  # whose vectors' spectrum is taken
    likeness: float = 0.9  # cosine of a query and its passage
    work: Path = Path("runs/ann")
    threads: int = 1


def spectrum(kb: Path) -> tuple[np.ndarray, np.ndarray]:
    """(mean (d,), a square root of the covariance (d, d)) of the passages' vectors."""
    index = faiss.read_index(str(kb / TEXT_INDEX), faiss.IO_FLAG_MMAP_IFC)
    vectors = index.reconstruct_n(0, index.ntotal)  # (N, d)
    values, directions = np.linalg.eigh(np.cov(vectors.T))
    root = directions * np.sqrt(values.clip(0))
    return vectors.mean(0), np.ascontiguousarray(root.T, dtype=np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make(args: Args, size: int, path: Path) -> np.ndarray:
    """(size, d) float32 unit vectors in a file, mapped."""
    mean, root = spectrum(args.kb)
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (size, len(mean)))
    for start in range(0, size, CHUNK):
        drawn = rng.standard_normal((min(CHUNK, size - start), len(mean)), dtype=np.float32)
        out[start : start + CHUNK] = unit(mean + drawn @ root)
    return out


def make_queries(args: Args, vectors: np.ndarray) -> np.ndarray:
    """(queries, d): passages drawn at random, turned away from by an angle of cosine `likeness`."""
    rng = np.random.default_rng(1)
    near = vectors[np.sort(rng.choice(len(vectors), args.queries, replace=False))]
    away = rng.standard_normal(near.shape).astype(np.float32)
    away = unit(away - (away * near).sum(1, keepdims=True) * near)
    return args.likeness * near + (1 - args.likeness**2) ** 0.5 * away


def nearest(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(queries, K) rows, exact, chunk by chunk."""
    best = np.full((len(queries), K), -np.inf, np.float32)
    rows = np.zeros((len(queries), K), np.int64)
    for start in range(0, len(vectors), CHUNK):
        scores = queries @ vectors[start : start + CHUNK].T  # (queries, CHUNK)
        found = np.argpartition(-scores, K, axis=1)[:, :K]
        best = np.concatenate([best, np.take_along_axis(scores, found, 1)], 1)
        rows = np.concatenate([rows, found + start], 1)
        order = np.argsort(-best, axis=1)[:, :K]
        best, rows = (np.take_along_axis(x, order, 1) for x in (best, rows))
    return rows


def measure(args: Args, kind: str, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray):
    """Yield {"kind", "nprobe", "recall", "bytes", "rate", "minutes"} of an index."""
    # 1) built
    started = time.time()
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        cells = int(kind.split(",")[0][3:]) if kind.startswith("IVF") else 1000
        sample = np.random.default_rng(2).choice(len(vectors), min(len(vectors), 64 * cells))
        index.train(vectors[np.sort(sample)])
    for start in range(0, len(vectors), CHUNK):
        index.add(np.ascontiguousarray(vectors[start : start + CHUNK]))
    minutes = (time.time() - started) / 60
    size = len(faiss.serialize_index(index)) if len(vectors) <= 1_000_000 else 0
    # 2) searched
    for nprobe in args.nprobes if kind.startswith("IVF") else (0,):
        if nprobe:
            faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)
        started = time.time()
        _, rows = index.search(queries, K)
        rate = len(queries) / (time.time() - started)
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(rows.tolist(), truth.tolist())])
        yield {
            "kind": kind,
            "nprobe": nprobe,
            "recall": round(float(recall), 3),
            "bytes": round(size / len(vectors)),
            "rate": round(rate),
            "minutes": round(minutes, 1),
        }


def main(args: Args):
    faiss.omp_set_num_threads(args.threads)
    for size in args.sizes:
        vectors = make(args, size, args.work / f"{size}.npy")
        queries = make_queries(args, vectors)
        truth = nearest(vectors, queries)
        for kind in args.kinds:
            kind = kind.replace("N,", f"{round(4 * size**0.5)},")
            for found in measure(args, kind, vectors, queries, truth):
                print(json.dumps({"vectors": size} | found), flush=True)
        del vectors
    shutil.rmtree(args.work)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
