"""A Wan2.1 checkpoint folder in the Hugging Face layout: is it whole, and which weights does it hold."""

from __future__ import annotations

import gc
import hashlib
import json
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from wan_scale.data.files import known_sha256, read_json
from wan_scale.data.stored import DIFFUSERS, NAME, check, files, weight_files

PARTS = {  # part of a Wan2.1 folder: (its config, its weights)
    "tokenizer": ("tokenizer_config.json", None),
    "text_encoder": ("config.json", "model.safetensors"),
    "transformer": ("config.json", NAME),
    "vae": ("config.json", NAME),
    "scheduler": ("scheduler_config.json", None),
}
PIECE = 4096  # bytes of a tensor that its fingerprint reads
CLASSES = {"text_encoder": "UMT5EncoderModel", "transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}


def check_folder(folder: str | Path, parts=tuple(PARTS), own: dict | None = None) -> Path:
    """The folder's path, if it is a diffusers Wan2.1 folder and `parts` of it are whole and fit their configs exactly.

    Reads headers alone. Else ValueError naming the first bad file, RuntimeError naming the first bad tensor. own: of
    an exported folder, the class of each part that is not the stock one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a Wan2.1 checkpoint folder in diffusers' layout.")
    if not (folder / "model_index.json").is_file():
        if any(folder.glob("models_t5_umt5*")) or any(folder.glob("Wan2.1_VAE*")):
            raise ValueError(f"{folder} is Wan's original checkpoint, not diffusers' layout; download {DIFFUSERS}.")
        raise ValueError(
            f"{folder} lacks model_index.json; give a folder in diffusers' layout (Wan2.1-T2V-...-Diffusers)."
        )
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind != ("TMDWanPipeline" if own else "WanPipeline") or index.get("transformer_2") not in (None, [None, None]):
        if own:
            raise ValueError(f"{folder} holds a {kind} and no student; give a folder that `export` has made.")
        raise ValueError(
            f"{folder} holds a {kind} that is not Wan2.1 text-to-video; give a WanPipeline of one transformer."
        )
    for part in parts:
        config, weights = PARTS[part]
        if not (folder / part / config).is_file():
            raise ValueError(f"{folder} lacks {part}/{config}; copy the missing file.")
        words = [folder / part / name for name in ("tokenizer.json", "spiece.model")]
        if part == "tokenizer" and not any(path.is_file() for path in words):
            raise ValueError(f"{folder} lacks {part}/tokenizer.json or spiece.model; copy the missing file.")
        for path in weight_files(folder / part, weights) if weights else ():
            if not path.is_file():
                raise ValueError(f"{folder} lacks {part}/{path.name}; {instead(path)}.")
            try:
                safe_open(path, "pt")  # reads the header and compares it with the size
            except (SafetensorError, OSError) as e:
                broken = f"{folder / part / path.name} is truncated or not safetensors ({type(e).__name__})"
                raise ValueError(f"{broken}; copy it again.") from e
    configs = {part: read_json(folder / part / PARTS[part][0]) for part in parts}
    for part, config in configs.items():
        if part in CLASSES:
            check_part(folder / part, part, config, (own or {}).get(part))
    for key, other, same in (("in_channels", "vae", "z_dim"), ("text_dim", "text_encoder", "d_model")):
        a, b = (configs.get(part, {}).get(name) for part, name in (("transformer", key), (other, same)))
        if a != b and None not in (a, b):
            apart = f"{folder}: {key} of the transformer is {a} and {same} of the {other} {b}"
            raise ValueError(f"{apart}; take both from the same download.")
    return folder


def instead(path: Path) -> str:
    """What to do about a weight file that is not there, by what lies in its place."""
    pieces = sorted(path.parent.glob(f"{path.stem}-*-of-*.safetensors"))
    if pieces and "-of-" not in path.name:
        return f"{pieces[0].name} is there, so copy {path.name}.index.json as well"
    other = [file.name for file in sorted(path.parent.iterdir()) if file.suffix in (".bin", ".pt", ".pth", ".gguf")]
    if other:
        return f"{other[0]} is not read, download the safetensors of {DIFFUSERS}"
    other = [file.name for file in sorted(path.parent.glob("*.safetensors")) if "-of-" not in file.name]
    return f"{other[0]} lies there under another name" if other else "copy the missing file"


def stock(part: str):
    """The class of a part."""
    import diffusers
    import transformers

    return getattr(transformers if part == "text_encoder" else diffusers, CLASSES[part])


def check_part(folder: Path, part: str, config: dict, made_by=None) -> None:
    """One part's config and weights: ValueError or RuntimeError in a sentence unless they are its class's own.

    made_by: that class, where it is not the stock one.
    """
    cls = made_by or stock(part)
    where, wanted = folder / PARTS[part][0], cls.__name__
    named = config.get("_class_name") or config.get("architectures") or wanted
    named = named[0] if isinstance(named, list) else named
    if named != wanted:
        raise ValueError(f"{where} is of a {named}, not of a {wanted}; give a text-to-video folder ({DIFFUSERS}).")
    if part == "transformer":
        channels = config.get("in_channels", 16), config.get("out_channels", 16)
        if channels[0] != channels[1] or any(config.get(k) is not None for k in ("image_dim", "added_kv_proj_dim")):
            kind = f"{where} is of an image-to-video checkpoint (in_channels {channels[0]}, out_channels {channels[1]})"
            raise ValueError(f"{kind}; give a text-to-video one ({DIFFUSERS}).")
    if part == "vae":
        for key in ("latents_mean", "latents_std"):
            if not isinstance(values := config.get(key), list) or len(values) != config.get("z_dim", 16):
                raise ValueError(f"{where} lacks {key} of {config.get('z_dim', 16)} channels; copy it again.")
        packed = [config.get(f"scale_factor_{axis}", default) for axis, default in (("temporal", 4), ("spatial", 8))]
        if [*packed, config.get("patch_size")] != [4, 8, None]:
            raise ValueError(f"{where} does not pack 4 frames of 8x8 pixels, as Wan2.1 does; copy it again.")
    try:
        net = skeleton(cls, json.dumps(config))
    except Exception as e:  # whatever a constructor says to values that it was not made for
        raise ValueError(f"{where} does not describe a {wanted} ({type(e).__name__}); copy it again.") from e
    ignore = tuple(getattr(net, "_keys_to_ignore_on_load_unexpected", None) or ())
    check(net, files(folder, name=PARTS[part][1]), ignore)


@lru_cache(maxsize=8)
def skeleton(cls, config: str):
    """A part without memory, of its config as JSON: a command checks its folder several times."""
    from accelerate import init_empty_weights

    config = json.loads(config)
    # constructors draw: the first call would move what is drawn next, and the others would not
    with init_empty_weights(), torch.random.fork_rng(devices=[]):
        return cls(cls.config_class.from_dict(config)) if hasattr(cls, "config_class") else cls.from_config(config)


@contextmanager
def loading(folder: str | Path):
    """Within, a library loads from the folder; ValueError in one sentence where it cannot, whatever it raises."""
    try:
        yield
    except Exception as e:  # transformers, tokenizers and diffusers raise all kinds for a file that they do not know
        why = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else 'no reason given'}"
        raise ValueError(f"{folder} cannot be loaded ({why}); copy or make it again.") from e


def check_words(folder: str | Path, tokenizer, encoder) -> None:
    """ValueError where the tokenizer cannot pad, or knows more words than the text encoder has embeddings."""
    if tokenizer.pad_token is None:
        raise ValueError(f"{Path(folder) / 'tokenizer'} names no pad_token; copy tokenizer_config.json again.")
    words, known = len(tokenizer), encoder.config.vocab_size
    if words > known:
        told = f"{Path(folder) / 'tokenizer'} has {words} words and the text encoder {known}"
        raise ValueError(f"{told}; take both from the same download.")


def fingerprint(folder: Path, part: str) -> str:
    """sha256 of a part's config, of its weight files' headers and of the middle of every tensor.

    It tells two fine-tunings apart, of a few layers too, without reading all weights.
    """
    config, weights = PARTS[part]
    digest = hashlib.sha256((folder / part / config).read_bytes())
    for path in weight_files(folder / part, weights):
        with open(path, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(header)
            for start, end in sorted(e["data_offsets"] for e in json.loads(header).values() if "data_offsets" in e):
                file.seek(8 + len(header) + max(start, (start + end) // 2 - PIECE // 2))
                digest.update(file.read(min(PIECE, end - start)))
    return digest.hexdigest()


def checksums(folder: str | Path, parts=("tokenizer", "text_encoder", "vae")) -> dict[str, str]:
    """{part: sha256 of its config and of all its weights or words}: what a student shares with its folder.

    A second a GB, once a process.
    """
    found = {}
    for part in parts:
        where, (config, weights) = Path(folder) / part, PARTS[part]
        rest = weight_files(where, weights) if weights else (where / "tokenizer.json", where / "spiece.model")
        digests = [known_sha256(path) for path in (where / config, *rest) if path.is_file()]
        found[part] = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return found


def free_memory() -> None:
    """Give back what a model held; call it after dropping the last reference."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
