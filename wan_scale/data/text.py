"""Prompts to text embeddings, by the folder's own text encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from wan_scale.data.files import atomic
from wan_scale.data.folders import check_folder, check_words, free_memory, loading

TEXT_BATCH = 8  # prompts encoded at once


def encode_text(folder: str | Path, files: dict[Path, dict[str, str]], *, device="cpu", max_length: int = 512,
                progress: bool = True) -> None:  # fmt: skip
    """Embed prompts with the folder's text encoder: {path: {key: prompt}} -> a safetensors file for each path.

    Each file holds key -> (n, text_dim) bf16. Cleaning, tokens and truncation are the stock pipeline's. Its zero
    padding is left out; pad_text puts it back. A file that exists is not made again. Only tokenizer and text encoder
    are loaded, and freed before this returns.
    """
    files = {path: texts for path, texts in files.items() if not path.exists()}
    if not files:
        return
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder = check_folder(folder, ("tokenizer", "text_encoder"))
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    own = {"subfolder": "text_encoder", "dtype": dtype, "local_files_only": True}
    encoder = UMT5EncoderModel.from_pretrained(folder, **own).to(device).eval()
    with loading(folder / "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    check_words(folder, tokenizer, encoder)
    pipe = WanPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=None, scheduler=None, transformer=None)
    prompts, quiet = sum(map(len, files.values())), None if progress else True
    with torch.no_grad(), tqdm(total=prompts, desc="text", disable=quiet, mininterval=0.5) as bar:
        for path, texts in files.items():
            keys, embedded = list(texts), {}
            for i in range(0, len(keys), TEXT_BATCH):
                batch = keys[i : i + TEXT_BATCH]
                how = {"do_classifier_free_guidance": False, "max_sequence_length": max_length, "device": device}
                padded, _ = pipe.encode_prompt([texts[key] for key in batch], **how)
                if not bool(padded.isfinite().all()):
                    broken = (
                        f"the text encoder of {folder} gives values that are not finite (for {texts[batch[0]]!r}, say)"
                    )
                    raise RuntimeError(f"{broken}; copy its weights again.")
                for key, rows in zip(batch, padded.to("cpu", torch.bfloat16)):
                    true = rows.ne(0).any(1).nonzero()  # padding is exactly zero
                    embedded[key] = rows[: int(true.max()) + 1 if len(true) else 1].clone()
                bar.update(len(batch))
            with atomic(path) as file:
                file.write(save(embedded, {"sha256": digest(embedded)}))
    del pipe, encoder, tokenizer
    free_memory()


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of tensors by name, in order of name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read_negative(folder: Path, length: int) -> torch.Tensor:
    """The negative prompt's embedding in a data folder, padded: (length, text_dim). ValueError if it was damaged."""
    path = Path(folder) / "negative.safetensors"
    try:
        with safe_open(path, "pt") as file:
            text, told = file.get_tensor("negative"), (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as e:
        broken = f"{path} is missing or corrupted ({type(e).__name__})"
        raise ValueError(f"{broken}; delete it and run `data` again.") from e
    if told not in (None, digest({"negative": text})):
        raise ValueError(f"{path} is damaged (its checksum differs); delete it and run `data` again.")
    return pad_text(text, length)


def pad_text(text: torch.Tensor, length: int) -> torch.Tensor:
    """Zero-pad text tokens (n, text_dim) to (length, text_dim), as Wan takes them; ValueError if they are more."""
    if len(text) > length:
        raise ValueError(
            f"a text of {len(text)} tokens does not fit text_length = {length}; give at least {len(text)}."
        )
    return F.pad(text, (0, 0, 0, length - len(text)))
