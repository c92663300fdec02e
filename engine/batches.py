"""How encoders batch: rows of like length together, and every CPU core on batches of its own."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def like_length(lengths: list[int], tokens: int) -> list[list[int]]:
    """All rows in batches of like length, so that little is padded. A batch has at most `tokens`
    tokens, padding included; a longer row is alone.

    >>> like_length([9, 2, 8, 2], tokens=16)
    [[1, 3], [2], [0]]
    """
    batches = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        # The newest row is the longest: all others are padded to its length.
        if not batches or (len(batches[-1]) + 1) * lengths[row] > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def on_each_core(work: Callable[[list], list], items: list) -> list:
    """[a result per item], in order, where work(some of the items) gives these items' results.

    Each of torch's threads becomes a Python thread that does every n-th item on one core. OpenMP
    would share each kernel between the cores, and let them wait for each other after each: half of
    the time, where a kernel takes a millisecond.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return work(items)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = list(pool.map(work, [items[i::threads] for i in range(threads)]))
    finally:
        torch.set_num_threads(threads)
    results = [None] * len(items)
    for i, part in enumerate(parts):
        results[i::threads] = part
    return results
