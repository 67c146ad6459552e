"""Prompt files: one prompt a line (.txt), or JSON lines {"prompt": ..., "seed": ...} (.jsonl)."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

# Wan2.1's own default: `sample_neg_prompt` of wan/configs/shared_config.py in its authors' repository.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

# Controls, NUL among them, but no tab; and halves of a character, which JSON can write and UTF-8 cannot.
CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]")
UNREADABLE = re.compile(f"{CONTROL.pattern}|\ufffd")  # or what a decoder puts where it found no character


def decoded(data: bytes) -> str:
    """Text of a file in UTF-8, or in UTF-16 by its byte order mark; ValueError for other encodings (GBK, say).

    They cannot be told apart with certainty, and a wrong guess would be trained on.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"not UTF-{16 if utf16 else 8}") from None


def read_prompts(path: str | Path, numbered: bool = True) -> list[dict]:
    """The prompts of a file as [{"prompt": str, "seed": int}].

    A prompt without a seed takes its index here, blank lines not counted (None if not `numbered`). Raises ValueError in
    one sentence with the numbers of the bad lines.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path.name} is no prompt file; give a .txt with one prompt a line or a .jsonl.")
    if not path.is_file():
        raise ValueError(f"{path} is missing; give an existing prompt file.")
    prompts, bad, data = [], [], path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = decoded(data).encode()
        except ValueError as e:
            raise ValueError(f"{path.name} is {e}, as its first bytes say; save it as UTF-8.") from None
    # split at newlines only: str.splitlines would also split at separators inside a prompt, and miscount the lines
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            prompts.append(parse(line, path.suffix == ".jsonl", len(prompts) + len(bad) if numbered else None))
        except ValueError as e:
            bad.append(f"line {number}: {e}")
    if bad:
        shown = "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else "")
        raise ValueError(
            f"{path.name} has {len(bad)} bad line{'s' * (len(bad) > 1)} ({shown}); correct or remove them."
        )
    if not prompts:
        raise ValueError(f"{path.name} holds no prompt; write one a line.")
    return prompts


def parse(line: bytes, is_json: bool, index: int | None) -> dict:
    """One line as {"prompt", "seed"}; ValueError says what is wrong with it."""
    try:
        entry = {"prompt": line.decode()}
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if is_json:
        try:
            entry = json.loads(entry["prompt"])
        except ValueError:
            raise ValueError("not JSON") from None
        if not isinstance(entry, dict) or "prompt" not in entry:
            raise ValueError("no prompt")
    prompt, seed = entry["prompt"], entry.get("seed", index)
    if not isinstance(prompt, str):
        raise ValueError("prompt is not a string")
    prompt = prompt.strip()
    if not prompt:
        raise ValueError("no prompt")
    if CONTROL.search(prompt):
        raise ValueError("control character")
    if (seed is not None or "seed" in entry) and (type(seed) is not int or not 0 <= seed < 2**63):
        raise ValueError("seed is not an integer from 0 to 2^63 - 1")
    return {"prompt": prompt, "seed": seed}
