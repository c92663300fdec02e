"""Searches of many clients as one batch at a time, so that none waits for another's hundreds."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import product

ITEMS = 64  # of a batch


@dataclass
class Job:
    """What one client asked."""

    items: list
    k: int
    costs: list[float]  # of the items
    answers: list = field(default_factory=list)  # of the first items
    future: Future = field(default_factory=Future)  # the answers of all of them


class Batcher:
    """Runs `search(items, k)` in a thread of its own, on some items of every job that waits.

    search: k answers of each item, best first. cost: of an item; a batch takes items, one of each
    job in turn, until there are ITEMS, or their costs exceed `budget` together. So a small job
    waits for one batch or, where there are many jobs, until each had its turn. A job whose items
    make `search` raise gets the exception, and harms no other.
    """

    def __init__(self, search, cost: Callable[[object], float] = lambda item: 0, budget: float = 1):
        self.search, self.cost, self.budget = search, cost, budget
        self.waiting = queue.Queue()
        self.batches = 0
        threading.Thread(target=self.run, daemon=True).start()

    def submit(self, items: list, k: int) -> Future:
        """Of the k first answers of each item. Cancel it where nobody waits for them any more."""
        job = Job(items, k, [self.cost(item) for item in items])
        self.waiting.put(job)
        return job.future

    def run(self):
        jobs = []
        while True:
            # 1) Wait for a job, then take the others that wait; some were given up.
            if not jobs:
                jobs.append(self.waiting.get())
            while not self.waiting.empty():
                jobs.append(self.waiting.get())
            jobs = [job for job in jobs if not job.future.cancelled()]
            # 2) Search for some items of each.
            self.batches += 1
            shares = self.shares(jobs)
            self.answer(shares)
            # 3) Those that have all of their answers, or an exception, leave. The first ones were
            #    in this batch; those for which it had no room come first in the next.
            jobs = jobs[len(shares) :] + jobs[: len(shares)]
            for job in jobs:
                if len(job.answers) == len(job.items) and job.future.set_running_or_notify_cancel():
                    job.future.set_result(job.answers)
            jobs = [job for job in jobs if not job.future.done()]

    def shares(self, jobs: list[Job]) -> list[tuple[Job, list]]:
        """The next items of each job: one of each in turn, while the batch has room."""
        left = [job.items[len(job.answers) :] for job in jobs]
        costs = [job.costs[len(job.answers) :] for job in jobs]
        counts = [0] * len(jobs)
        taken, spent = 0, 0.0
        for turn, number in product(range(ITEMS), range(len(jobs))):
            if turn >= len(left[number]):
                continue
            spent += costs[number][turn]
            if taken and (taken >= ITEMS or spent > self.budget):
                break
            counts[number] += 1
            taken += 1
        return [(job, mine[:n]) for job, mine, n in zip(jobs, left, counts) if n]

    def answer(self, shares: list[tuple[Job, list]]):
        """Give the jobs their items' answers; where that fails, each by itself."""
        if not shares:
            return
        everything = [item for _, items in shares for item in items]
        try:
            found = self.search(everything, max(job.k for job, _ in shares))
            if len(found) != len(everything):
                raise RuntimeError(f"{len(found)} answers to {len(everything)} items")
        except Exception as error:
            if len(shares) > 1:
                for share in shares:
                    self.answer([share])
            elif shares[0][0].future.set_running_or_notify_cancel():
                shares[0][0].future.set_exception(error)
            return
        rest = iter(found)
        for job, items in shares:
            job.answers += [next(rest)[: job.k] for _ in items]
