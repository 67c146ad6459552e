"""Sizes from a config alone: tokens of a clip; parameters of teacher, student, adapters and discriminator.

A GB is 2^30 bytes. Nothing in this folder needs weights, and only report.py and benchmarks.py need torch.
"""

from __future__ import annotations

import math

WAN = {
    "1.3b": dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, in_channels=16,
                 out_channels=16, text_dim=4096, freq_dim=256, patch_size=(1, 2, 2), cross_attn_norm=True),
    "14b": dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40, in_channels=16,
                out_channels=16, text_dim=4096, freq_dim=256, patch_size=(1, 2, 2), cross_attn_norm=True),
}  # fmt: skip
SCALES = (1, 2, 4, 8, 16)  # the discriminator's, as in model.py
GB = 2**30


def known(config: dict) -> dict:
    """The fields needed here, of a transformer's config. RAISES ValueError where one is missing or cannot be."""
    if missing := sorted(key for key in WAN["1.3b"] if key not in config and key != "cross_attn_norm"):
        absent = ", ".join(missing)
        raise ValueError(f"the transformer config has no {absent}; give transformer/config.json of a Wan2.1 folder.")
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        other = "this is the config of an image-to-video checkpoint"
        raise ValueError(f"{other}; give a text-to-video one (Wan2.1-T2V-1.3B or -14B).")
    found = {"cross_attn_norm": True} | {key: config[key] for key in WAN["1.3b"] if key in config}
    found |= {"patch_size": tuple(found["patch_size"]), "out_channels": found["out_channels"] or found["in_channels"]}
    return found | {"D": found["num_attention_heads"] * found["attention_head_dim"]}  # the width


def latent(frames: int = 81, height: int = 480, width: int = 832) -> tuple[int, int, int]:
    """Frames, height and width of the VAE's latent: a quarter (and the first frame) in time, an eighth in space."""
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames is {frames}; the VAE wants 4k + 1, such as {max(1, frames // 4 * 4 + 1)}.")
    return (frames - 1) // 4 + 1, height // 8, width // 8


def tokens(config: dict, frames: int = 81, height: int = 480, width: int = 832) -> int:
    """Tokens of one clip; RAISES ValueError where the clip does not split into patches."""
    grid, patch = latent(frames, height, width), known(config)["patch_size"]
    for name, size, p in (("height", height, patch[1]), ("width", width, patch[2])):
        if size < 1 or size % (8 * p):
            times = f"{8 * p} (the VAE's 8 times the patch of {p})"
            raise ValueError(f"{name} is {size}; it must be a multiple of {times}.")
    if grid[0] % patch[0]:
        uneven = f"{grid[0]} latent ones, which patches of {patch[0]} do not divide"
        raise ValueError(f"{frames} frames are {uneven}; choose another number.")
    return math.prod(n // p for n, p in zip(grid, patch))


def parameters(config: dict) -> dict[str, int]:
    """Parameters of the teacher: {"block" (one), "blocks", "embeddings", "output", "total"}."""
    k = known(config)
    D, F, patch = k["D"], k["ffn_dim"], math.prod(k["patch_size"])
    attention = 4 * D * (D + 1) + 2 * D  # q, k, v, out; the norms of q and k
    block = 2 * attention + 2 * D * F + F + D + 6 * D + 2 * D * k["cross_attn_norm"]
    time = (k["freq_dim"] + 1) * D + (D + 1) * D
    embeddings = (k["in_channels"] * patch + 1) * D + time + (D + 1) * 6 * D + (k["text_dim"] + 1) * D + (D + 1) * D
    output = (D + 1) * k["out_channels"] * patch + 2 * D
    return {"block": block, "blocks": k["num_layers"] * block, "embeddings": embeddings, "output": output,
            "total": k["num_layers"] * block + embeddings + output}  # fmt: skip


def student_parameters(config: dict, H: int = 5) -> dict[str, int]:
    """Parameters of tmd.TMDStudent: the teacher's, a second time embedding for s - r, the fusion MLP and its gate.

    H = 0: PlainStudent.
    """
    k, teacher = known(config), parameters(config)["total"]
    if not 0 <= H < k["num_layers"]:
        L = k["num_layers"]
        raise ValueError(f"the flow head has H = {H} of {L} blocks; choose 1 to {L - 1}, or 0 for DMD2-v.")
    D = k["D"]
    span, fusion = (k["freq_dim"] + 1) * D + (D + 1) * D, 4 * D * D + 6 * D
    added = {"span": span, "fusion": fusion, "gate": D} if H else {"span": 0, "fusion": 0, "gate": 0}
    return {"teacher": teacher, **added, "total": teacher + sum(added.values())}


def lora_parameters(config: dict, H: int = 5, rank: int = 64) -> dict[str, int]:
    """Parameters that --lora trains: {"own", "student", "fake"}.

    "own" is the student without the blocks of its backbone; the other two are the adapters of student and fake score.
    """
    k, block = known(config), parameters(config)["block"]
    D, L = k["D"], k["num_layers"]
    sides = 8 * 2 * D + 2 * (D + k["ffn_dim"])  # inputs and outputs of a block's ten linear layers
    own = student_parameters(config, H)["total"] - (L - H) * block
    return {"own": own, "student": (L - H) * rank * sides, "fake": L * rank * sides}


def discriminator(config: dict, size: tuple[int, int, int], conv_width: int, taps: int = 3, hidden: int = 1024) -> dict:
    """WanDiscriminator on `taps` features of a latent of `size` (frames, height, width).

    -> {"parameters", "flops" (one forward), bytes for the backward pass: "features" (kept with activation checkpointing
    of the branches), "live" (then of the branch that runs backwards), "kept" (without it)}. "kept" is an estimate: a
    branch saves in fp32 each norm's input and output and what the pool sees; the branches share the bf16 features.
    """
    k = known(config)
    channels = k["D"] // math.prod(k["patch_size"])
    full, pooled = math.prod(size), [math.prod(n // min(s, n) for n in size) for s in SCALES]
    branch = (channels + 1) * conv_width + (27 * conv_width + 1) * conv_width + 4 * conv_width
    logit = (len(SCALES) * conv_width + 1) * hidden + hidden + 1
    flops = sum(2 * conv_width * (full * channels + 27 * conv_width * p) for p in pooled)
    flops += 2 * hidden * (len(SCALES) * conv_width + 1)
    saved, features = [full * 12 * conv_width + 10 * p * conv_width for p in pooled], taps * full * 2 * channels
    total = taps * (len(SCALES) * branch + logit)
    return {"parameters": total, "flops": taps * flops, "features": features,
            "kept": features + taps * sum(saved), "live": max(saved)}  # fmt: skip
