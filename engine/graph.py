"""A decode step as one CUDA graph: its thousand kernels are launched at once.

The CPU launches a step's kernels one after another, which may take longer than they compute. Once
recorded, they are launched together, and Python does not run: shapes, places in memory and every
number of Python's stay what they were. So a recording serves while the cache keeps its layout, and
for at most BLOCK tokens; then another is made. Making one waits for the GPU and empties the
allocator's cache, so a kind of step is recorded after EAGER_CALLS of it.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from engine.distributed import gathers

# The cache is read in whole blocks of so many places, so that a recording serves for as many steps.
BLOCK = 128
EAGER_CALLS = 4


class RecordedStep:
    """Calls a step, or the recording of it. Without `record`, always the step itself."""

    def __init__(self, record: Callable | None):
        """record: (work) → (replay, output): replay() does what work() would, and overwrites the
        output. Recording itself computes nothing."""
        self.record = record
        self.forget(None)

    def forget(self, key: Hashable):
        """Start anew, with steps of this kind."""
        self.key, self.calls = key, 0
        self.inputs, self.replay, self.output = (), None, None

    def __call__(self, step: Callable, key: Hashable, *inputs: Tensor) -> Tensor:
        """step(*inputs), a tensor, which the next call may overwrite.

        key: equal for calls that one recording may serve: all that the step uses beside its inputs
        lies where it lay. The step is not kept: it would keep its sampler's cache alive.
        """
        if key != self.key:
            self.forget(key)
        self.calls += 1
        if self.record is None or self.calls <= EAGER_CALLS:
            return step(*inputs)
        if self.replay is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.replay, self.output = self.record(lambda: step(*self.inputs))
        for place, tensor in zip(self.inputs, inputs):
            place.copy_(tensor)
        self.replay()
        return self.output


def recorder(model, device: torch.device, wanted: bool) -> Callable | None:
    """What records a step of this model; None where nothing can, or should.

    Not where weights are gathered layer by layer: they would lie elsewhere in every step.
    """
    if not wanted or device.type != "cuda" or gathers(model):
        return None
    return record_on_gpu


def record_on_gpu(work: Callable) -> tuple[Callable, Tensor]:
    """(replay, output) of work(), which runs on the current GPU and returns a tensor."""
    # Each graph has a pool of memory of its own: one that outlives its only graph cannot be used
    # again. thread_local: other threads (NCCL's watchdog) may go on using CUDA.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = work()
    return graph.replay, output
