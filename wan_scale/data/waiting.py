"""How long a rank waits for its data: clips in rCM's tars, read in place and as our own shards, ahead and not.

    python -m wan_scale.data.waiting --out results/wan_waiting/full.json    # 81 frames of 480 x 832, 2 GB
    python -m wan_scale.data.waiting --frames 9 --height 64 --width 64 --out results/wan_waiting/tiny.json

A step is a pause of --step seconds, in which the reading thread has the processor to itself. Every clip is read once,
after the system has been told to forget the files. Only the numbers are kept (--out); `make publish` writes the table
of README.md from them.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
import time
from pathlib import Path

import torch

from settings import write_json
from wan_scale.data.ahead import Ahead
from wan_scale.data.published import take
from wan_scale.data.reader import Reader
from wan_scale.tiny import make_tiny


def write_clips(folder: Path, clips: int, shape: tuple[int, ...], text_dim: int) -> None:
    """Random clips in a tar, as rCM publishes them."""
    folder.mkdir()
    with tarfile.open(folder / "shard00000.tar", "w") as tar:
        for i in range(clips):
            tensors = {"latent.pt": torch.randn(shape).bfloat16(), "embed.pt": torch.randn(512, text_dim).bfloat16()}
            for name, x in tensors.items():
                torch.save(x, data := io.BytesIO())
                info = tarfile.TarInfo(f"{i:09d}.{name}")
                info.size = data.tell()
                tar.addfile(info, io.BytesIO(data.getvalue()))


def forget(folder: Path) -> None:
    """Drop a folder's files from the system's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def waited(folder: Path, files: Path, step: float, depth: int) -> tuple[float, float]:
    """(seconds that a call waits, share of a step), the mean over an epoch of batches of one clip."""
    forget(files)
    reader = Reader(folder, verify=False)
    ahead = Ahead(reader, reader.batch, stride=1, depth=depth)
    ahead(0, 1)  # the first waits in any case
    ahead.waited, ahead.calls = 0.0, 0
    for position in range(1, len(reader)):
        time.sleep(step)
        ahead(position, 1)
    seconds = ahead.waited / ahead.calls
    return seconds, seconds / (seconds + step)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("frames", 81), ("height", 480), ("width", 832), ("clips", 128), ("text-dim", 4096)):
        p.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    p.add_argument("--step", type=float, default=0.25, help="seconds of a step (default: 0.25)")
    p.add_argument("--out", help="write the numbers to this JSON file")
    p.add_argument("--folder", help="make the clips below this folder, on the disk to be measured")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    size = {"frames": args.frames, "height": args.height, "width": args.width}
    shape = (16, (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model = make_tiny(folder / "model", text_dim=args.text_dim)
        write_clips(folder / "from", args.clips, shape, args.text_dim)
        take(model, folder / "from", folder / "in place", **size)
        take(model, folder / "from", folder / "shards", convert=True, **size)
        told = " x ".join(map(str, shape))
        print(f"{args.clips} clips of {told}, texts of 512 x {args.text_dim}, one a step of {args.step:g} s")
        print(f"{'':<12}{'ahead':>8}{'ms waited':>12}{'share of the step':>20}")
        rows = []
        for kind, files in (("in place", "from"), ("shards", "shards")):
            for depth in (0, 4):
                seconds, share = waited(folder / kind, folder / files, args.step, depth)
                print(f"{kind:<12}{depth:>8}{1000 * seconds:>12.2f}{share:>20.2%}", flush=True)
                rows.append({"kind": kind, "ahead": depth, "ms": 1000 * seconds, "share": share})
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out), {"clips": args.clips, "shape": shape, "step": args.step, "rows": rows})


def table(records: list[dict]) -> str:
    """What --out wrote, as Markdown: each kind of clips, read when asked for and ahead."""
    lines = ["| clips | read when asked for | ahead |", "|---|---|---|"]
    for record in records:
        size = " x ".join(map(str, record["shape"]))
        for kind, words in (("in place", "rCM's tars in place"), ("shards", "our own shards")):
            found = [row for row in record["rows"] if row["kind"] == kind]
            cells = [f"{row['ms']:.2f} ms, {row['share']:.2%} of a step" for row in found]
            lines.append(f"| {size}, {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
