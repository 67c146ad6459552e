"""Batches read ahead of the training in a thread, so that a GPU does not wait for the disk."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor


class Ahead:
    """read(position, n) of a Reader (its batch or pairs), the next `depth` calls of it in host memory already.

    A training asks for every `stride`-th position. What it asks for decides what it gets, and the guess only when that
    is read: another position (after a resume, say) is read on the spot. An error is raised by the call whose samples
    could not be read. `waited` counts the seconds that calls stood still for the disk, `calls` the calls.
    """

    def __init__(self, reader, read, stride: int, depth: int):
        self.reader, self.source, self.stride, self.depth = reader, read, stride, depth
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="reading ahead") if depth else None
        self.waiting: dict[tuple[int, int], Future] = {}
        self.waited, self.calls = 0.0, 0

    def __call__(self, position: int, n: int):
        began, asked = time.perf_counter(), (position, n)
        due = self.waiting.pop(asked, None) or self.start(asked)
        tensors = due.result() if due else self.source(position, n, host=True)
        self.waited, self.calls = self.waited + time.perf_counter() - began, self.calls + 1
        wanted = [(position + k * self.stride, n) for k in range(1, self.depth + 1)]
        for other in self.waiting.keys() - set(wanted):  # of a place that the training has left
            self.waiting.pop(other).cancel()
        for key in wanted:
            if key not in self.waiting:
                self.waiting[key] = self.start(key)
        return self.reader.move(tensors)

    def start(self, key: tuple[int, int]) -> Future | None:
        return self.thread.submit(self.source, *key, host=True) if self.thread else None
