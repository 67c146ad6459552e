"""A GPU that has no memory: what it takes to run the training on CARD (ledger.py), and nothing of the training itself.

    with card(ranks=8) as ledger:
        ...                      # tensors on CARD are fake, collectives return at once

Fake tensors carry shape, type and device. Three things of PyTorch do not work on them or differ from a GPU, and are
replaced within: moving a module, FSDP's choice of the device, and autocast's list of what runs in float32.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.distributed as collective
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from wan_scale.rehearsal.ledger import CARD, Ledger
from wan_scale.training import dist

IN_FLOAT32 = ("layer_norm", "group_norm", "softplus")  # under autocast on a GPU; on a CPU they stay in bf16


def apply(module, fn, recurse=True):
    """nn.Module._apply, whose own way does not work on fake tensors: new parameters take the places of the old."""
    for child in module.children():
        child._apply(fn)
    for table in (module._parameters, module._buffers):
        for key, old in table.items():
            if old is not None and (new := fn(old)) is not old:
                table[key] = nn.Parameter(new, old.requires_grad) if table is module._parameters else new
    return module


def in_float32(function):
    """A function of torch.nn.functional as autocast on a GPU calls it."""

    def called(*args, **kw):
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kw)
        wide = lambda v: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        with torch.autocast("cpu", enabled=False):
            return function(*map(wide, args), **{key: wide(v) for key, v in kw.items()})

    return called


@contextmanager
def card(ranks: int = 1, on_operation=lambda: None):
    """Within, this process is the first of `ranks`, CARD its GPU; yields the Ledger."""
    if ranks > 1:
        collective.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    changed = {
        (nn.Module, "_apply"): apply,
        (torch.distributed.fsdp._fully_shard._fully_shard, "_get_device_from_mesh"): lambda mesh: CARD,
        (dist, "start"): lambda *_, **__: CARD,
        (dist, "agreed"): lambda value: value,
        (dist, "barrier"): lambda: None,
        (dist, "gathered"): lambda value: [value] * ranks,
        **{(F, name): in_float32(getattr(F, name)) for name in IN_FLOAT32},
    }
    try:
        with ExitStack() as stack:
            for (owner, name), value in changed.items():
                stack.enter_context(patch.object(owner, name, value))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            yield stack.enter_context(Ledger(on_operation))
    finally:
        dist.stop()
