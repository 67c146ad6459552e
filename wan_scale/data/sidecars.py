"""What a data folder's JSON files say, checked: a damaged one is a sentence that names it."""

from __future__ import annotations

from pathlib import Path

from wan_scale.data.files import read_json

whole = lambda x: type(x) is int and x >= 0
text = lambda x: type(x) is str
number = lambda x: type(x) in (int, float)
flag = lambda x: type(x) is bool
many = lambda of: lambda x: type(x) is list and all(map(of, x))
clip = lambda x: type(x) is dict and whole(x.get("id")) and text(x.get("prompt", ""))
left_out = lambda x: clip(x) and text(x.get("reason"))

SIDECAR = {
    "file": text, "sha256": text, "bytes": whole, "manifest": text, "latent_shape": many(whole),
    "mean": many(number), "std": many(number), "clips": many(clip), "dropped": many(left_out),
}  # fmt: skip
MANIFEST = {
    "kind": text, "model": text, "latent_shape": many(whole), "text_length": whole, "kd": flag,
    "vae_mean": many(number), "vae_std": many(number),
}  # fmt: skip
OWN = {"prompts": whole, "shard_size": lambda x: whole(x) and x > 0}
AGAIN = "delete it and its .json and run `data` again"


def checked(path: Path, fields: dict, again: str) -> dict:
    """A JSON file's object; ValueError if it lacks one of `fields` or holds something else there."""
    value = read_json(path)
    if bad := sorted(key for key, fits in fields.items() if not fits(value.get(key))):
        raise ValueError(f"{path} lacks {', '.join(bad)} or is damaged; {again}.")
    return value


def read_sidecar(path: Path) -> dict:
    """The sidecar of a shard or of a published file."""
    return checked(path, SIDECAR, "delete it and its shard and run `data` again")


def read_sidecars(out: str | Path) -> list[dict]:
    """The sidecars of a folder, in order of name."""
    return [read_sidecar(path) for path in sorted(Path(out).glob("shard-*.json"))]


def lacking(out: str | Path, manifest: dict, sidecars: list[dict]) -> str:
    """What `data` has still to make in a folder, in words; "" where it is complete."""
    made = {s["file"]: len(s["clips"]) + len(s["dropped"]) for s in sidecars}
    if "format" not in manifest:
        n = manifest["prompts"] - sum(made.values())
        return f"{n} of {manifest['prompts']} clips" if n else ""
    wanted = read_json(Path(out) / "source.json").get("files")
    wanted = wanted if isinstance(wanted, dict) else {}  # an older version wrote none
    of = {s["file"]: s.get("of") for s in sidecars}
    left = [name for name, n in wanted.items() if made.get(name, 0) != (of.get(name, -1) if n is None else n)]
    return f"{len(left)} of {len(wanted)} files" if left else ""


def read_manifest(out: str | Path) -> dict:
    """The manifest of a folder."""
    path = Path(out) / "manifest.json"
    manifest = checked(path, MANIFEST, "copy it again")
    return manifest if "format" in manifest else checked(path, OWN, "copy it again")
