"""manifest.json of a data folder: what every clip in it was made with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from wan_scale.data.files import read_json, write_json
from wan_scale.data.folders import fingerprint
from wan_scale.data.prompts import NEGATIVE

# not compared by readers: a renamed model folder or a newer library is no other data; text_encoder may be unknown
LABELS = {"model", "versions", "text_encoder"}
GROWING = {"prompts", "prompts_sha256"}  # how many clips, and which: more may come behind those that are there


def make_manifest(folder: Path, kind: str, frames: int, height: int, width: int, **rest) -> dict:
    """What a folder of clips is made with; ValueError if frames, height or width do not fit the model."""
    import diffusers
    import transformers

    transformer, vae = (read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    time, space = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    patch = transformer["patch_size"]
    if frames < 1 or frames % time != 1:
        raise ValueError(f"frames is {frames}; the VAE takes {time}k + 1 (81, say).")
    for name, value, step in (("height", height, space * patch[1]), ("width", width, space * patch[2])):
        if value < step or value % step:
            raise ValueError(f"{name} is {value}; give a multiple of {step}.")
    return {
        "kind": kind,
        "model": folder.resolve().name,
        "transformer": fingerprint(folder, "transformer"),
        "text_encoder": fingerprint(folder, "text_encoder"),
        "negative_prompt": NEGATIVE,
        "text_length": 512,
        "text_dim": transformer["text_dim"],
        "frames": frames,
        "height": height,
        "width": width,
        "latent_shape": [transformer["in_channels"], (frames - 1) // time + 1, height // space, width // space],
        "normalisation": "vae",  # latents are (z - vae_mean) / vae_std, as the transformer takes them
        "vae_mean": vae["latents_mean"],
        "vae_std": vae["latents_std"],
        **rest,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
    }


def manifest_digest(manifest: dict) -> str:
    """sha256 of what a folder's manifest promises."""
    kept = {key: value for key, value in manifest.items() if key not in LABELS | GROWING}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def records_digest(records: list[dict]) -> str:
    """sha256 of what the clips are made of: prompts and seeds, or names of videos and captions."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def open_out(out: str | Path, manifest: dict, records: list[dict] | None = None) -> Path:
    """Make the folder and its manifest, to which the number and digest of `records` are added.

    It may be there already, also with fewer records, if they are the first of these. ValueError naming what differs.
    """
    if records is not None:
        manifest |= {"prompts": len(records), "prompts_sha256": records_digest(records)}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "manifest.json"
    if path.exists():
        old = read_json(path)
        differs = sorted(key for key in {*old, *manifest} - LABELS - GROWING if old.get(key) != manifest.get(key))
        texts = {one.get("text_encoder") for one in (old, manifest)} - {None}  # older and published folders have none
        differs += ["text_encoder"] * (len(texts) > 1)
        if differs:
            told = ", ".join(f"{key} ({str(old.get(key))[:40]}, now {str(manifest.get(key))[:40]})" for key in differs)
            raise ValueError(f"{out} was made with another {told}; give the same settings or another folder.")
        if records is not None and any(old.get(key) != manifest[key] for key in GROWING):
            n = old.get("prompts", 0)
            if n > len(records):
                raise ValueError(
                    f"{out} was made for {n} clips, now {len(records)}; ask for as many, or give another folder."
                )
            if records_digest(records[:n]) != old.get("prompts_sha256"):
                first = f"its {n} prompts or videos are not the first {n} of these"
                raise ValueError(
                    f"{out} was made from others ({first}); put new ones at the end, or give another folder."
                )
            write_json(path, manifest)
    else:
        write_json(path, manifest)
    return out
