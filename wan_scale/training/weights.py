"""Weights go straight from their files to where they will live: no process ever holds a network that it does not keep.

net = skeleton(folder, torch.bfloat16)      # the stock transformer; its blocks have shapes and no memory
net = dist.shard(net)                       # so that sharding them costs nothing
fill(net, device, files(folder))            # and every rank reads its own rows
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from wan_scale.data.files import writing
from wan_scale.data.stored import Stored, check, files
from wan_scale.training import dist


def cast(model, dtype: torch.dtype):
    """Parameters to `dtype` but for what diffusers keeps in float32 (times, tables, norms); returns the model."""
    for name, p in model.named_parameters():
        if not any(part in model._keep_in_fp32_modules for part in name.split(".")):
            p.data = p.data.to(dtype)
    return model


def empty(config: dict, dtype: torch.dtype = torch.float32, device="cpu"):
    """The stock transformer of a config in from_pretrained's dtypes: parameters without memory, buffers on `device`."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    # from_pretrained's own way: it draws the same numbers, so a student's new layers come out the same, too
    with torch.device(device), init_empty_weights():
        return cast(WanTransformer3DModel.from_config(config), dtype)


def skeleton(folder: str | Path, dtype: torch.dtype = torch.float32):
    """A Wan2.1 folder's stock transformer in from_pretrained's dtypes.

    Its blocks have no memory yet; embeddings and output layer are read.
    """
    from diffusers import WanTransformer3DModel

    net = empty(WanTransformer3DModel.load_config(folder, subfolder="transformer"), dtype).eval()
    stored = files(Path(folder) / "transformer")
    check(net, stored, tuple(net._keys_to_ignore_on_load_unexpected))
    return fill(net, "cpu", {name: s for name, s in stored.items() if not name.startswith("blocks.")})


@torch.no_grad()
def fill(module: nn.Module, device, stored: dict[str, Stored] | None = None, change: dict | None = None):
    """Read every parameter that is `stored` (default: module.stored); returns the module.

    Of a sharded parameter only this rank's rows are read. A parameter without memory gets it on `device`; the others
    stay where they are. change: {name: function of what was read}, for parameters that are whole.
    """
    stored, opened, change = module.stored if stored is None else stored, {}, change or {}
    for path, owner in module.named_modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            if (s := stored.get(full := f"{path}.{name}".lstrip("."))) is None:
                continue
            if p.is_meta:
                p = placed(owner, name, device)
            if s.file not in opened:
                opened[s.file] = safe_open(s.file, "pt")
            first, last = rows(p)
            if first < last:
                read = opened[s.file].get_slice(s.key)[first:last]
                dist.local(p).copy_(change[full](read) if full in change else read)
    return module


def placed(owner: nn.Module, name: str, device) -> nn.Parameter:
    """Memory on `device` for a parameter that has none; the new parameter."""
    p = getattr(owner, name)
    p = nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
    owner.register_parameter(name, p)
    return p


@torch.no_grad()
def draw(module: nn.Module, device, but: str | None = None):
    """Random numbers, for want of weights, in every parameter without memory yet, but for names that begin with `but`.

    Never more than one parameter beside the module. Returns it.
    """
    for path, owner in module.named_modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            if p.is_meta and not (but and f"{path}.{name}".startswith(but)):
                p = placed(owner, name, device)
                p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(float(name == "weight"))  # or a bias, or a norm's scale
    return module


def read(s: Stored) -> torch.Tensor:
    """One tensor, whole."""
    with safe_open(s.file, "pt") as file:
        return file.get_tensor(s.key)


def check_finite(module: nn.Module, where) -> None:
    """RuntimeError if a parameter is NaN or infinite: its videos would show nothing.

    Of a sharded net each rank reads its own part, and all ranks, who must call, say the same.
    """
    finite = {name: torch.isfinite(dist.local(p)).all() for name, p in module.named_parameters()}
    bad = [name for name, good in finite.items() if not bool(good)]  # the device has all to do before the first wait
    if any(isinstance(p, DTensor) for p in module.parameters()):
        bad = list(dict.fromkeys(name for part in dist.gathered(bad) for name in part))
    if bad:
        more = f", and {len(bad) - 1} more" * (len(bad) > 1)
        raise RuntimeError(f"{where} holds weights that are not finite ({bad[0]}{more}); make or copy it again.")


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file, there whole or not at all; RuntimeError where the disk does not take it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            save_file(tensors, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rows(p: torch.Tensor) -> tuple[int, int]:
    """The first row that this rank holds of a parameter, and the one after its last.

    FSDP2 shards rows, over the mesh's last axis.
    """
    if not isinstance(p, DTensor):
        return 0, len(p)
    axis = p.device_mesh.ndim - 1
    each = -(-len(p) // p.device_mesh.size(axis))  # as torch.chunk: the last ranks may have fewer, or none
    first = each * p.device_mesh.get_local_rank(axis)
    return min(first, len(p)), min(first + each, len(p))
