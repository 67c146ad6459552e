"""Does it distil? A small stock Wan learns the moving shapes, and a student of it is judged beside it by their ruler.

    python -m wan_scale.shapes --out runs/wan-shapes      # about a quarter of an hour on one core; goes on after a stop
    python -m wan_scale.shapes --quick                    # the same path in seconds: it works (its clips are noise)

Folder, shards, teacher, stage 1 and stage 2 are those of the full ladder. Only text encoder and VAE have nothing to do
here: a word of the prompt is a row of a fixed code, and a clip's pixels, normalised, are its latent. Numbers land in
OUT/scores.json.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save

import tmd_minimal as tmd
from settings import command
from toys.moving_shapes import SHADES, SHAPES, WORDS, World, encode
from toys.ruler import Ruler
from wan_scale.config import Wan
from wan_scale.data.files import atomic, write_json
from wan_scale.data.manifest import open_out
from wan_scale.data.shards import fill, finished
from wan_scale.tiny import make_tiny
from wan_scale.training import train, weights

WORLD = World(8, 12)  # frames, pixels
# choice: of five motions the two that a teacher learns in minutes; data/checks.py drops clips that are still
PROMPTS = [" ".join(words) for words in itertools.product(SHADES, SHAPES, ("straight", "circle"))]
EMPTY_PROMPT = "any any any"
MEAN, STD = -0.87, 0.35  # of a pixel of this world
# Every word is a row of signs: unit variance as a real embedding has, exact in bf16.
CODE = torch.randint(2, (len(WORDS), 32), generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(torch.bfloat16)

TRANSFORMER = dict(
    in_channels=1, out_channels=1, patch_size=(2, 4, 4), num_layers=6, num_attention_heads=4, attention_head_dim=16,
    ffn_dim=256, text_dim=CODE.shape[1],
)  # fmt: skip
# Rates, guidance and shifts are those of toy_video.py (but Wan's for s), for the same reasons.
# Effective NFE is 1 (1 + 3 * 2 / 6) = 2.
SETTINGS = dict(
    device="cpu", precision="fp32", clips=4096, shard_size=512, M=1, N=4, H=2, inner_shift=1.0, flow_shift=1.0,
    dmd_shift=1.0, data_guidance=2.0, stage1_guidance=2.0, stage2_guidance=2.0, teacher_updates=4000, teacher_lr=3e-3,
    stage1_updates=200, stage1_lr=1e-4, stage2_iterations=500, stage2_lr=1e-3, global_batch=32, micro_batch=32,
    taps="2,4", disc_width=8, preview_every=0, save_every=500,
)  # fmt: skip
QUICK = dict(
    clips=96, shard_size=64, teacher_updates=2, stage1_updates=2, stage2_iterations=5, global_batch=4, micro_batch=4
)


def to_latents(clips: torch.Tensor) -> torch.Tensor:
    """Clips in [-1, 1] to what the transformer takes, mean 0 and variance 1."""
    return (clips - MEAN) / STD


def to_clips(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of to_latents."""
    return latents * STD + MEAN


def embed(prompt: str) -> torch.Tensor:
    """The text embedding of a prompt, one token a word: (3, 32) bf16."""
    return CODE[encode(prompt)]


def make_shapes_folder(folder: str | Path, seed: int = 0) -> Path:
    """A Wan2.1 folder with a stock transformer for shape clips (1, 8, 12, 12), made once; returns its path."""
    return make_tiny(folder, seed, **TRANSFORMER)


def write_shards(out: str | Path, clips: int, seed: int = 0, shard_size: int = 512) -> int:
    """Rendered clips and their text in the layout of data/shards.py; returns how many were made now.

    A clip depends on its prompt and seed alone. A stopped run goes on.
    """
    out = Path(out)
    records = [{"prompt": PROMPTS[i % len(PROMPTS)], "seed": seed * clips + i} for i in range(clips)]
    manifest = {
        "kind": "shapes", "model": "moving shapes", "negative_prompt": EMPTY_PROMPT, "text_length": 3,
        "text_dim": CODE.shape[1], "latent_shape": [1, WORLD.frames, WORLD.size, WORLD.size], "normalisation": "vae",
        "vae_mean": [MEAN], "vae_std": [STD], "kd": False, "shard_size": shard_size, "prompts": clips, "seed": seed,
    }  # fmt: skip
    open_out(out, manifest, records)
    texts = {out / "negative.safetensors": {"negative": embed(EMPTY_PROMPT)}}
    for k, start in enumerate(range(0, clips, shard_size)):
        ids = range(start, min(start + shard_size, clips))
        if not finished(out, k, len(ids)):
            texts[out / "parts" / f"{k:05d}" / "text.safetensors"] = {str(i): embed(records[i]["prompt"]) for i in ids}
    for path, tensors in texts.items():  # fill() embeds only what is not there, so it needs no text encoder
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(save(tensors))

    def make(record, text):
        clip, _, _ = WORLD.draw(1, torch.Generator().manual_seed(record["seed"]), encode(record["prompt"])[None])
        return {"latent": to_latents(clip[0])}

    return fill(None, out, manifest, records, lambda: make, rank=0, world=1, device="cpu")


def score(samples: torch.Tensor, prompts: list[str]) -> dict:
    """The ruler's means for latents (n, 1, 8, 12, 12) of `prompts`.

    "error" is the standard error of the total, without diversity's.
    """
    found = Ruler(WORLD).score(to_clips(samples), torch.stack([encode(prompt) for prompt in prompts]))
    each = (found["clips"]["quality"] + found["clips"]["semantic"] + found["clips"]["motion"]) / 4
    keys = ("total", "quality", "semantic", "motion", "diversity")
    return {key: found[key] for key in keys} | {"error": each.std().item() / len(each) ** 0.5}


def settings(out: str | Path, **changes) -> Wan:
    """The run's settings."""
    return Wan(**{**SETTINGS, "out": str(out), "model": str(Path(out) / "wan"), **changes})


def run(cfg: Wan, samples: int = 192) -> dict:
    """The whole ladder; what is finished is not done again. Returns what OUT/scores.json holds.

    That is a row for each model, all on the same noise.
    """
    start = time.perf_counter()
    make_shapes_folder(cfg.model, cfg.seed)
    write_shards(cfg.shards, cfg.clips, cfg.seed, cfg.shard_size)
    train.teacher(cfg)
    train.stage1(cfg)
    facts = train.stage2(cfg)

    prompts = [PROMPTS[i // 4 % len(PROMPTS)] for i in range(samples)]  # the ruler needs four clips of a prompt
    g = torch.Generator().manual_seed(cfg.seed + 10_000)
    noise = torch.randn(samples, 1, WORLD.frames, WORLD.size, WORLD.size, generator=g)
    c, c_neg = torch.stack([embed(prompt) for prompt in prompts]).float(), embed(EMPTY_PROMPT).float()
    teacher, how, rows = weights.fill(train.network(cfg), "cpu").eval(), cfg.how(), {}

    def keep(name, nfe, latents):
        rows[name] = {"effective_nfe": nfe, **score(latents, prompts)}
        print(
            f"{name:<18} NFE {nfe:<5.3g} "
            + "   ".join(f"{key} {v:.3f}" for key, v in rows[name].items() if key[:3] != "eff"),
            flush=True,
        )

    for steps in (50, 1):
        grid = tmd.make_grid(steps, cfg.flow_shift, dtype=torch.float64)
        x = tmd.sample_teacher(teacher, noise, c, c_neg, grid=grid, guidance=cfg.data_guidance)
        keep(f"teacher, {steps} step{'s' * (steps > 1)}", 2.0 * steps, x)  # guidance evaluates it twice a step
    student = weights.fill(train.make_student(cfg, how, "stage2"), "cpu").eval()
    keep("student", facts["effective_nfe"], train.draw(student, how, noise, c, seed=cfg.seed))
    scores = {"models": rows, "samples": samples, "seconds": round(time.perf_counter() - start, 1)}
    write_json(cfg.folder("scores.json"), scores)
    return scores


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = "everything is written below this folder (default: runs/wan-shapes, with --quick runs/wan-shapes-quick)"
    p.add_argument("--out", help=where)
    p.add_argument("--seed", type=int, default=0, help="seed of weights, clips and draws (default: 0)")
    p.add_argument("--quick", action="store_true", help="a few updates of everything")
    args = p.parse_args(argv)
    torch.set_num_threads(1)  # so small that a second thread only waits
    out = args.out or f"runs/wan-shapes{'-quick' * args.quick}"
    cfg = settings(out, seed=args.seed, **(QUICK if args.quick else {}))
    return command("wan_scale.shapes", lambda: run(cfg, 12 if args.quick else 192))


if __name__ == "__main__":
    sys.exit(main())
