"""Worlds of gloo ranks, forked from a server that has imported torch, diffusers and wan_scale once.

A rank has torchrun's environment and calls what torchrun would; test_wan_train.py starts torchrun itself.
"""

import multiprocessing
import os
import socket
import sys
import time
from multiprocessing import forkserver

import pytest
import torch


def rank(number: int, world: int, port: int, work, args) -> None:
    """One process of a world."""
    from wan_scale.training import dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.start("cpu")
    work(*args)
    dist.barrier()
    dist.stop()


def launch(world: int, work, *args) -> None:
    """Call work(*args), a function of a module, on every rank of a world; AssertionError unless all end well."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["wan_ranks"])
    with pytest.MonkeyPatch.context() as patch:  # else Python 3.11 finds no module, and each rank imports all
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [server.Process(target=rank, args=(i, world, port, work, args)) for i in range(world)]
    [p.start() for p in ranks]
    deadline = time.monotonic() + 240
    while any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)  # one that fails would leave the others waiting
    [p.kill() for p in ranks]
    [p.join() for p in ranks]
    assert [p.exitcode for p in ranks] == [0] * world, "a rank failed: its traceback stands above"
