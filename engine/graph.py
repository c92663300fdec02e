"""A decode step as one CUDA graph: its thousand kernels are launched at once.

A step of a 7B computes for some milliseconds, and the CPU launches its kernels one after another,
which takes longer. Recorded once, they are launched together, without Python. A recording has fixed
shapes, and reads and writes fixed places in memory: it serves while the cache keeps its layout, and
for PLACES tokens; then the next one is made.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from engine.distributed import gathers

# The cache is read in whole blocks of so many places, so that a recording serves for as many steps.
PLACES = 128


class RecordedStep:
    """step(*inputs), or the recording of it. Without `record`, always the step itself."""

    def __init__(self, step: Callable, record: Callable | None):
        """
        step: of tensors, returns a tensor; all else that it uses must lie where it lay
        record: (work) → (function that does the same again, its output)
        """
        self.step, self.record = step, record
        self.key, self.inputs, self.replay, self.output = None, (), None, None

    def __call__(self, key: Hashable, *inputs: Tensor) -> Tensor:
        """key: equal for calls that one recording may serve. The output is overwritten by the next
        call."""
        if self.record is None or key != self.key:
            # The first of its kind also makes what is made only once (a library's workspace, say),
            # which must not happen while recording.
            self.key, self.replay, self.output = key, None, None
            return self.step(*inputs)
        if self.replay is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.replay, self.output = self.record(lambda: self.step(*self.inputs))
        for place, tensor in zip(self.inputs, inputs):
            place.copy_(tensor)
        self.replay()
        return self.output


def recorder(model, device: torch.device, wanted: bool) -> Callable | None:
    """What records a step of this model; None where nothing can, or should.

    A model that gathers its weights layer by layer waits for other ranks in each step.
    """
    if not wanted or device.type != "cuda" or gathers(model):
        return None
    pool = torch.cuda.graph_pool_handle()  # recordings follow each other in the same memory

    def record(work: Callable) -> tuple[Callable, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads (NCCL's watchdog) may go on using CUDA
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = work()
        return graph.replay, output

    return record
