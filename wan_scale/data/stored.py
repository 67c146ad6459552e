"""Which tensors safetensors files hold, and whether they are those of a network: headers alone are read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from wan_scale.data.files import read_json

NAME = "diffusion_pytorch_model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # what is read as it stands; fp8 and integers need scales
DIFFUSERS = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers or -14B-Diffusers"

# part of a name that has no place: (what the file is, what to do)
SIGNS = {
    "vace_": ("a VACE checkpoint", f"give a text-to-video one ({DIFFUSERS})"),
    "image_embedder": ("an image-to-video checkpoint", f"give a text-to-video one ({DIFFUSERS})"),
    "img_emb": ("an image-to-video checkpoint", f"give a text-to-video one ({DIFFUSERS})"),
    "add_k_proj": ("an image-to-video checkpoint", f"give a text-to-video one ({DIFFUSERS})"),
    "scaled_fp8": ("scaled fp8", "give the original in bfloat16 or float32"),
    "scale_weight": ("scaled fp8", "give the original in bfloat16 or float32"),
    "weight_scale": ("scaled fp8", "give the original in bfloat16 or float32"),
    "self_attn.q": ("Wan's original layout", f"download {DIFFUSERS}"),
    "lora_": ("a LoRA alone", "merge it into the folder's weights first"),
}


class Stored(NamedTuple):
    """Where a tensor is."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str = "F32"


def weight_files(folder: Path, name: str = NAME) -> list[Path]:
    """The safetensors files of a folder, whether one or split under an index; ValueError if the index is none."""
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files; copy it again.")
    return [folder / file for file in sorted(set(names.values()))]


def files(path: str | Path, prefix: str = "", name: str = NAME) -> dict[str, Stored]:
    """The tensors of a safetensors file, or of a folder of such files, by name with `prefix` before it.

    Reads headers only; RuntimeError where a file is missing or damaged.
    """
    path, found = Path(path), {}
    for file in weight_files(path, name) if path.is_dir() else [path]:
        try:
            with safe_open(file, "pt") as stored:
                for key in stored.keys():
                    part = stored.get_slice(key)
                    found[prefix + key] = Stored(file, key, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as e:
            raise RuntimeError(f"{file} is missing or damaged; fetch or make it again.") from e
    return found


def check(module: nn.Module, stored: dict[str, Stored], ignore: tuple[str, ...] = ()) -> None:
    """RuntimeError unless `stored` has every parameter of the module, in its shape, as plain floats, and no other.

    Others may be there if one of `ignore` is in their name. Of tied weights one is enough.
    """
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    for one, other in (getattr(module, "_tied_weights_keys", None) or {}).items():
        if one in wanted and other in wanted and (one in stored) != (other in stored):
            del wanted[one if other in stored else other]
    found = {name: s for name, s in stored.items() if name in wanted or not any(part in name for part in ignore)}
    extra = [name for name in found if name not in wanted]
    packed = [f"{name} is of type {s.dtype}" for name, s in found.items() if s.dtype not in FLOATS]
    wrong = [f"{name} is not there" for name in wanted if name not in found]
    wrong += [f"{name} has no place" for name in extra]
    wrong += [f"{name} is of shape {s.shape}" for name, s in found.items() if wanted.get(name, s.shape) != s.shape]
    wrong += packed
    if not wrong:
        return
    what, fix = next((told for sign, told in SIGNS.items() if any(sign in name for name in extra)), (None, None))
    if not what and packed:
        what, fix = "quantised", "give the original in bfloat16 or float32"
    if not what and extra and (last := max((n for n in wanted if extra[0].endswith("." + n)), key=len, default="")):
        prefix = extra[0].removesuffix(last)
        what, fix = f"a copy with {prefix!r} before its names", "take that prefix off"
    where, more = next((s.file.parent for s in stored.values()), "the file"), f", and {len(wrong) - 1} more"
    why = f"{wrong[0]}{more * (len(wrong) > 1)}" + (f"; it looks like {what}" if what else "")
    fix = fix or "give the folder that belongs to it"
    raise RuntimeError(f"{where} does not hold the weights of this network ({why}); {fix}.")
