"""One thread for all tests: the networks are tiny, and two threads are slower (and noisier) on them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def g():
    """A generator for draws."""
    return torch.Generator().manual_seed(0)
