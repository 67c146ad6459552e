"""A Wan2.1 checkpoint folder in the Hugging Face layout: is it whole, and which weights does it hold."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from wan_scale.data.files import read_json

PARTS = {  # part of a Wan2.1 folder: (its config, its weights)
    "tokenizer": ("tokenizer_config.json", None),
    "text_encoder": ("config.json", "model.safetensors"),
    "transformer": ("config.json", "diffusion_pytorch_model.safetensors"),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors"),
    "scheduler": ("scheduler_config.json", None),
}


def check_folder(folder: str | Path, parts=tuple(PARTS)) -> Path:
    """The folder's path, if it is a diffusers Wan2.1 folder and `parts` of it are whole.

    Else ValueError naming the first bad file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a Wan2.1 checkpoint folder in diffusers' layout.")
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} lacks model_index.json; give a folder in diffusers' layout (Wan2.1-T2V-...-Diffusers)."
        )
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "WanPipeline" or (index.get("transformer_2") or [None])[0]:
        other = f"{folder} holds a {index.get('_class_name')} that is not Wan2.1 text-to-video"
        raise ValueError(f"{other}; give a WanPipeline of one transformer.")
    for part in parts:
        config, weights = PARTS[part]
        if not (folder / part / config).is_file():
            raise ValueError(f"{folder} lacks {part}/{config}; copy the missing file.")
        words = [folder / part / name for name in ("tokenizer.json", "spiece.model")]
        if part == "tokenizer" and not any(path.is_file() for path in words):
            raise ValueError(f"{folder} lacks {part}/tokenizer.json or spiece.model; copy the missing file.")
        for path in weight_files(folder, part) if weights else ():
            if not path.is_file():
                lacks = path.name
                if not (folder / part / f"{weights}.index.json").is_file() and any(
                    path.parent.glob("*-of-*.safetensors")
                ):
                    lacks = f"{weights}.index.json, which names the pieces of the weights"
                raise ValueError(f"{folder} lacks {part}/{lacks}; copy the missing file.")
            try:
                safe_open(path, "pt")  # reads the header and compares it with the size
            except (SafetensorError, OSError) as e:
                broken = f"{folder / part / path.name} is truncated or not safetensors ({type(e).__name__})"
                raise ValueError(f"{broken}; copy it again.") from e
    return folder


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of a part, whether one or split under an index."""
    name = PARTS[part][1]
    index = folder / part / f"{name}.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [name]
    return [folder / part / name for name in names]


def fingerprint(folder: Path, part: str) -> str:
    """sha256 of a part's config and of the end of each weight file.

    It tells two fine-tunings apart without reading all weights.
    """
    digest = hashlib.sha256((folder / part / PARTS[part][0]).read_bytes())
    for path in weight_files(folder, part):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def free_memory() -> None:
    """Give back what a model held; call it after dropping the last reference."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
