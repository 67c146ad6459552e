"""What tests of Wan's data and folders share: a teacher and a text encoder that cost nothing, bytes, one sentence."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save

from wan_scale.data import shards, teacher
from wan_scale.data.files import atomic


def make_fake(monkeypatch) -> None:
    """A teacher that hands back its noise and a text encoder that writes ones; all around them is the real thing."""

    def encode(folder, files, **_):
        for path, texts in files.items():
            if not path.exists():
                with atomic(path) as file:
                    file.write(save({key: torch.ones(3, 32, dtype=torch.bfloat16) for key in texts}))

    monkeypatch.setattr(shards, "encode_text", encode)
    monkeypatch.setattr(teacher, "load_teacher", lambda *_: lambda noise, text: noise)
    # nothing to free, and collecting garbage takes longer than all the rest
    monkeypatch.setattr(shards, "free_memory", lambda: None)


def contents(folder: Path) -> dict:
    """{path below the folder: its bytes}"""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def says(error, *words):
    """The one sentence of an error, which holds the given words."""
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and not re.search(r"[.!?] [A-Z]", text), text
    for word in words:
        assert word in text, text


def with_a_flipped_bit(folder: Path, copy: Path) -> Path:
    """A copy of a model folder with a bit of its transformer flipped where its fingerprint does not look: in the first
    byte of the largest tensor.
    """
    shutil.copytree(folder, copy)
    file = next((copy / "transformer").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    places = [e["data_offsets"] for e in json.loads(data[8 : 8 + header]).values() if "data_offsets" in e]
    data[8 + header + max(places, key=lambda at: at[1] - at[0])[0]] ^= 1
    file.write_bytes(data)
    return copy
