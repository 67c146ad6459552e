"""One thread for all tests: the networks are tiny, and two threads are slower (and noisier) on them."""

import gc
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


LONGEST = """toy wan_train wan_dist video wan_ulysses training shapes wan_rehearse wan_fuzz wan_lora wan_speed wan_run
wan_bench oracles wan_shapes""".split()


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that two workers end together; the order within a file stays.

    pytest-xdist keeps it with --no-loadscope-reorder.
    """
    rank = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def garbage():
    """What is there before a file's tests is not looked through again by each gc.collect(), a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def g():
    """A generator for draws."""
    return torch.Generator().manual_seed(0)


class Inline:
    """A pool of workers that does the work at once, in this process: the same calls without a second start of torch."""

    def __init__(self, n: int):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done


@pytest.fixture
def inline(monkeypatch):
    """Baseline and claims' jobs train in this process, for tests whose claim is not the workers."""
    from toys import claims, ladder

    monkeypatch.setattr(ladder, "workers", Inline)
    monkeypatch.setattr(claims, "workers", Inline)
