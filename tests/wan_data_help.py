"""What tests of Wan's data share: a teacher and a text encoder that cost nothing, a folder's bytes, one sentence."""

import re
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
