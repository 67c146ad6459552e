"""Does it fit, and how long does it take: parameters, memory, FLOPs and hours of a run, before anything is loaded.

    print(report("1.3b", gpus=8, card_gb=80))                        # or report(json.load(open("transformer/config.json")), ...)

Arithmetic on a transformer's config alone, so it needs neither weights nor torch. FLOPs count 2 a multiply-add, as (linear, attention).
What a step calls is what tmd_minimal's losses call; a GB is 2^30 bytes. Work is counted by unit (UNITS), for a card does each at a rate of
its own: one rate for all where none was measured, else those that `bench` measured (rates).
"""

from __future__ import annotations

import math
from itertools import islice

WAN = {
    "1.3b": dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, in_channels=16, out_channels=16,
                 text_dim=4096, freq_dim=256, patch_size=(1, 2, 2), cross_attn_norm=True),
    "14b": dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40, in_channels=16, out_channels=16,
                text_dim=4096, freq_dim=256, patch_size=(1, 2, 2), cross_attn_norm=True),
}  # fmt: skip
# Table 7: updates of stage 1, iterations of stage 2 at M = 1 and M >= 2, of DMD2-v's KD warm-up; width of the discriminator's convolutions
RUNS = {
    "1.3b": {"stage1": 3000, "stage2": (12000, 4000), "kd": 10000, "disc_width": 384},
    "14b": {"stage1": 3000, "stage2": (5000, 1000), "kd": 5000, "disc_width": 608},
}
GRIDS = (1, 1), (1, 2), (1, 4), (2, 2), (2, 4)  # (M, N) of the sampling table
SCALES = (1, 2, 4, 8, 16)  # the discriminator's, as in model.py
RESERVE = 0.08  # of a card: CUDA's context, NCCL's buffers, what the allocator wastes
GB = 2**30
CHECKPOINTING = ("none", "selective", "full")  # what of a block is computed again: nothing, all but attention, all; the fastest first
# What a card does at rates of its own: FLOPs of linear layers (forward and gradients of inputs), of gradients of their weights, of
# attention and of its gradient, of the discriminator, of float32 passes; bytes that elementwise work reads and writes.
UNITS = ("linear", "weight gradients", "attention", "attention backward", "convolution", "fp32 linear", "fp32 attention", "bytes")
# Bytes that elementwise work moves, counted on the stock block under bf16 autocast, in the forward and the backward pass: for a number of
# the hidden state in a block, uncompiled and compiled, and in the head's fusion and output layer; for a number of the feed-forward layer.
MOVED = {False: (354, 737), True: (42, 117)}
MOVED_OUTSIDE, MOVED_WIDE = (116, 215), (4, 8)


# ---- Sizes -----------------------------------------------------------------------------------------------------------


def known(config: dict) -> dict:
    """The fields that this file needs, from a config.json or a preset; RAISES ValueError where one is missing or cannot be."""
    if missing := sorted(key for key in WAN["1.3b"] if key not in config and key != "cross_attn_norm"):
        raise ValueError(f"the transformer config has no {', '.join(missing)}; give transformer/config.json of a Wan2.1 folder.")
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise ValueError("this is the config of an image-to-video checkpoint; give a text-to-video one (Wan2.1-T2V-1.3B or -14B).")
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
            raise ValueError(f"{name} is {size}; it must be a multiple of {8 * p} (the VAE's 8 times the patch of {p}).")
    if grid[0] % patch[0]:
        raise ValueError(f"{frames} frames are {grid[0]} latent ones, which patches of {patch[0]} do not divide; choose another number.")
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
    """Parameters of tmd.TMDStudent: the teacher's, a second time embedding for s - r, the fusion MLP and its gate. H = 0: PlainStudent."""
    k, teacher = known(config), parameters(config)["total"]
    if not 0 <= H < k["num_layers"]:
        raise ValueError(f"the flow head has H = {H} of {k['num_layers']} blocks; choose 1 to {k['num_layers'] - 1}, or 0 for DMD2-v.")
    D = k["D"]
    span, fusion = (k["freq_dim"] + 1) * D + (D + 1) * D, 4 * D * D + 6 * D
    added = {"span": span, "fusion": fusion, "gate": D} if H else {"span": 0, "fusion": 0, "gate": 0}
    return {"teacher": teacher, **added, "total": teacher + sum(added.values())}


def lora_parameters(config: dict, H: int = 5, rank: int = 64) -> dict[str, int]:
    """What --lora trains: {"own" (the student's but for the blocks of its backbone), "student", "fake" (the two adapters)}."""
    k, block = known(config), parameters(config)["block"]
    D, L = k["D"], k["num_layers"]
    sides = 8 * 2 * D + 2 * (D + k["ffn_dim"])  # inputs and outputs of a block's ten linear layers
    own = student_parameters(config, H)["total"] - (L - H) * block
    return {"own": own, "student": (L - H) * rank * sides, "fake": L * rank * sides}


def discriminator(config: dict, size: tuple[int, int, int], conv_width: int, taps: int = 3, hidden: int = 1024) -> dict[str, float]:
    """WanDiscriminator on `taps` features of a latent of `size` (frames, height, width).

    -> {"parameters", "flops" (one forward), "kept" and "live": bytes held for the backward pass, without and with recomputed branches}.
    "kept" is an estimate: a branch saves its input in bf16, and each norm's input and output and what the pool sees in fp32.
    """
    k = known(config)
    channels = k["D"] // math.prod(k["patch_size"])
    full, pooled = math.prod(size), [math.prod(n // min(s, n) for n in size) for s in SCALES]
    branch = (channels + 1) * conv_width + (27 * conv_width + 1) * conv_width + 4 * conv_width
    logit = (len(SCALES) * conv_width + 1) * hidden + hidden + 1
    flops = sum(2 * conv_width * (full * channels + 27 * conv_width * p) for p in pooled) + 2 * hidden * (len(SCALES) * conv_width + 1)
    saved = [full * (2 * channels + 12 * conv_width) + 10 * p * conv_width for p in pooled]
    return {"parameters": taps * (len(SCALES) * branch + logit), "flops": taps * flops, "kept": taps * sum(saved), "live": max(saved)}


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def flops(config: dict, n_tokens: int, text: int = 512, H: int = 5) -> dict[str, dict[str, float]]:
    """FLOPs of one forward of one clip: part -> {"linear", "attention", "total"}.

    Parts: "block" (one), "embeddings", "output", "whole" (the teacher); "backbone" (first L-H blocks), "head" (last H, with the fusion) of
    the student, and "backbone rest", "head rest": what of them is outside the blocks. With H = 0 the whole is the backbone.
    """
    k, n = known(config), n_tokens
    D, L, patch = k["D"], k["num_layers"], math.prod(k["patch_size"])
    student_parameters(config, H)  # checks H
    block = 2 * D * D * (6 * n + 2 * text) + 4 * n * D * k["ffn_dim"], 4 * n * D * (n + text)
    time, modulation = 2 * D * (k["freq_dim"] + D), 12 * D * D
    patches, words, output = 2 * n * k["in_channels"] * patch * D, 2 * text * D * (k["text_dim"] + D), 2 * n * D * k["out_channels"] * patch
    embeddings = patches + words + time + modulation
    head_rest = patches + 2 * time + 2 * modulation + 8 * n * D * D + output if H else 0  # s and s - r; modulated for fusion and for blocks
    backbone_rest = embeddings if H else embeddings + output
    parts = {
        "block": (block[0], block[1]),
        "embeddings": (embeddings, 0),
        "output": (output, 0),
        "whole": (L * block[0] + embeddings + output, L * block[1]),
        "backbone": ((L - H) * block[0] + backbone_rest, (L - H) * block[1]),
        "head": (H * block[0] + head_rest, H * block[1]),
        "backbone rest": (backbone_rest, 0),
        "head rest": (head_rest, 0),
    }
    return {name: {"linear": a, "attention": b, "total": a + b} for name, (a, b) in parts.items()}


def step_work(config: dict, n_tokens: int, kind: str, *, N: int = 2, H: int = 5, M: int = 1, last_tap: int | None = None,
              guidance: bool = True, gan: bool = True, disc_flops: float = 0.0, flow_map_share: float = 0.25, together: int = 1,
              attention_backward: float = 2.5, text: int = 512, lora: int = 0, checkpointing: str = "full",
              compiled: bool = False) -> dict[str, dict[str, float]]:  # fmt: skip
    """Work of one micro-batch of one clip, by what is evaluated and by unit: {term: {unit: FLOPs, or bytes}}.

    kind: "stage1" | "student" and "critic" (stage 2) | "kd" | "sample" (tmd.sample, M transitions) | "teacher" (one forward). H = 0, N = 1
    is DMD2-v. together: clips of all cards at once; if one of them needs stage 1's derivative (r < s), all wait for it.
    checkpointing: what of a block its backward pass computes again (CHECKPOINTING). attention_backward: how many forwards of it
    its gradient costs; fused kernels recompute the scores (2.5), plain ones do not (2). Under adapters (lora) the weights of a block
    take no gradient; the adapters' own products, about 2 % of a block's linear ones at rank 64, are left out.
    """
    known_mode(checkpointing)
    k, part = known(config), flops(config, n_tokens, text, H)
    L, n, (forward, backward), (wide, wide_backward) = k["num_layers"], n_tokens, MOVED[compiled], MOVED_WIDE
    last_tap = L - 1 if last_tap is None else last_tap
    if not 0 <= last_tap < L:
        raise ValueError(f"the last feature block is {last_tap}; give one of blocks 0 to {L - 1}.")
    linear, attention = part["block"]["linear"], part["block"]["attention"]
    moved, moved_back = n * (forward * k["D"] + wide * k["ffn_dim"]), n * (backward * k["D"] + wide_backward * k["ffn_dim"])

    def cost(blocks: int, rest: float, gradient: str = "none", outside: int = 0, times: float = 1) -> dict[str, float]:
        """Forward, and for a gradient the recomputed forward of the blocks, the gradient of inputs and, for "all", of weights."""
        inputs, weights = {"none": (0, 0), "inputs": (1, 0), "all": (1, 1)}[gradient]
        again, attend = inputs * (checkpointing != "none"), inputs * (checkpointing == "full")
        found = {
            "linear": blocks * (1 + again + inputs) * linear + (1 + inputs) * rest,
            "weight gradients": weights * (blocks * linear + rest),
            "attention": blocks * (1 + attend) * attention,
            "attention backward": inputs * blocks * attention_backward * attention,  # it has no weights: "inputs" saves nothing
            "bytes": blocks * ((1 + again) * moved + inputs * moved_back) + outside * n * k["D"],
        }
        return {unit: times * amount for unit, amount in found.items()}

    ends = part["embeddings"]["total"] + part["output"]["total"]
    fused = lambda gradient: (H > 0) * (MOVED_OUTSIDE[0] + (gradient != "none") * MOVED_OUTSIDE[1])
    backbone = lambda gradient="none", times=1: cost(L - H, part["backbone rest"]["total"], gradient, times=times)
    head = lambda gradient="none", times=1: cost(H, part["head rest"]["total"], gradient, fused(gradient), times)
    teacher = lambda gradient="none", times=1: cost(L, ends, gradient, times=times)
    features = lambda gradient="none", times=1: cost(last_tap + 1, part["embeddings"]["total"], gradient, times=times)
    both = lambda a, b: {unit: a[unit] + b[unit] for unit in a}
    exact = lambda work: {"fp32 linear": work["linear"], "fp32 attention": work["attention"], "bytes": work["bytes"]}
    convolution = lambda times: {"convolution": times * disc_flops}

    trained = "inputs" if lora else "all"
    if kind == "teacher":
        found = {"teacher": teacher()}
    elif kind == "sample":
        found = {"backbone": backbone(times=M), "head": head(times=M * N)}
    elif kind == "kd":
        found = {"backbone, trained": backbone(trained), "head, trained": head("all", N)}
    elif kind == "stage1":
        found = {
            "backbone, trained": backbone(trained),
            "head, trained": head("all"),
            "pass for c_neg": both(backbone(times=guidance), head(times=guidance)),
            "finite difference, fp32": exact(head(times=2 * (1 - (1 - flow_map_share) ** together))),
        }
    elif kind == "student":
        found = {
            "backbone, trained": backbone(trained),
            f"head x {N}, trained": head("all", N),
            "fake score": teacher(),
            "teacher, guided": teacher(times=1 + guidance),
            "teacher's features, with input gradient": features("inputs", gan),
            "discriminator, with input gradient": convolution(2 * gan),
        }
    elif kind == "critic":
        found = {
            "backbone": backbone(),
            f"head x {N}": head(times=N),
            "fake score, trained": teacher(trained),
            "teacher's features, real and fake": features(times=2 * gan),
            "discriminator, trained": convolution(6 * gan),
        }
    else:
        raise ValueError(f"kind is {kind!r}; choose one of 'stage1', 'student', 'critic', 'kd', 'sample', 'teacher'.")
    return {term: {unit: float(v) for unit, v in work.items() if v} for term, work in found.items() if any(work.values())}


def step_flops(config: dict, n_tokens: int, kind: str, *, fp32_slowdown: float = 2.0, **how) -> dict[str, float]:
    """FLOPs of step_work by term, fp32 ones counted `fp32_slowdown` times, so that all can be divided by one bf16 rate."""
    one = rates_of(1e-12, fp32_slowdown)
    return {term: time_of(work, one) for term, work in step_work(config, n_tokens, kind, **how).items()}


def known_mode(checkpointing: str) -> None:
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing is {checkpointing!r}; choose one of {', '.join(map(repr, CHECKPOINTING))}.")


# ---- Rates: from work to seconds -------------------------------------------------------------------------------------


def rates_of(tflops: float, fp32_slowdown: float) -> dict[str, float]:
    """One bf16 rate for everything, elementwise work for nothing: units of work a second, where no card was measured."""
    rate = {unit: tflops * 1e12 for unit in UNITS} | {"bytes": math.inf}
    return rate | {unit: tflops * 1e12 / fp32_slowdown for unit in ("fp32 linear", "fp32 attention")}


def rates(record: dict, tf32: bool = False, attn: str | None = None) -> dict:
    """Units of work a second as `bench` measured them, attention on backend `attn` or the one it took; and {"on": where}.

    RAISES ValueError where the record lacks one.
    """
    cases, attn = record.get("cases", {}), attn or record.get("attn")
    seconds, work = ({**cases.get(case, {}).get(key, {})} for case, key in (("rates", "seconds"), ("rates", "work")))
    attention = cases.get("attention", {}).get("seconds", {})
    if attn in attention and f"{attn}, with backward" in attention:
        flops = 4 * record["tokens"] ** 2 * known(record["config"])["D"]
        seconds |= {"attention": attention[attn], "attention backward": attention[f"{attn}, with backward"] - attention[attn]}
        seconds["attention backward"] = max(seconds["attention backward"], attention[attn])  # it computes more: less would be noise
        work |= {"attention": flops, "attention backward": 2.5 * flops}
    if missing := [unit for unit in UNITS if unit not in seconds]:
        raise ValueError(f"this file has no measured rate of {', '.join(missing)}; give a JSON that `bench` wrote, or --tflops.")
    name = lambda unit: f"{unit}, TF32" if tf32 and unit.startswith("fp32") else unit
    found = {unit: work[name(unit)] / seconds[name(unit)] for unit in UNITS}
    return found | {"on": f"{record['card']} with the shapes of {record['size']}, {record['date']}"}


def time_of(work: dict[str, float], rate: dict) -> float:
    """Seconds that a card of these rates takes for work {unit: amount}, one unit after the other."""
    return sum(amount / rate[unit] for unit, amount in work.items())


# ---- Memory ----------------------------------------------------------------------------------------------------------


def memory(config: dict, n_tokens: int, kind: str, *, gpus: int = 1, N: int = 2, H: int = 5, last_tap: int | None = None,
           disc: float = 0.0, disc_bytes: float = 0.0, shard_teacher: bool = True, micro_batch: int = 1, lora: int = 0,
           context_parallel: int = 1, checkpointing: str = "full", compiled: bool = False, shard_over: int = 0,
           offload_teacher: bool = False, accumulated: bool = True) -> dict[str, float]:  # fmt: skip
    """Bytes on each card at the peak of a step of `kind` ("stage1", "student", "critic", or "teacher" and "sample", all in bf16), by term.

    Trained nets: fp32 weights, gradients and AdamW's moments, sharded over `gpus` (FSDP2), or over `shard_over` of them, the others
    repeating it; the discriminator is whole on every card, so is the teacher (bf16) unless `shard_teacher`; with `offload_teacher` the host
    has it. Gradients exist only of the net being updated; where they are not `accumulated` over micro-batches, they come as the graph goes.
    disc: its parameters; disc_bytes: what one of its forwards keeps of a clip.
    Cards that share a clip hold 1 / context_parallel of its hidden states, and its features whole.
    With lora, the adapters' rank, every card holds the base and all that is trained, the host the average.
    ACTIVATIONS ARE AN ESTIMATE: what PyTorch saves on CPU, in bf16 autocast without its cache of casts.
    """
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}; it must be at least 1.")
    if kind not in ("stage1", "student", "critic", "teacher", "sample"):
        raise ValueError(f"kind is {kind!r}; choose one of 'stage1', 'student', 'critic', 'teacher', 'sample'.")
    known_mode(checkpointing)
    k, teacher = known(config), parameters(config)
    L, n = k["num_layers"], micro_batch * n_tokens // context_parallel
    wide, disc_bytes = n * k["D"], micro_batch * disc_bytes  # wide: numbers in one hidden state
    last_tap = L - 1 if last_tap is None else last_tap
    student, fake, stage2 = student_parameters(config, H)["total"], teacher["total"], kind != "stage1"
    passing = wide * max(20, 6 + 4 * k["ffn_dim"] / k["D"])  # what a block makes on its way, not to be kept
    if kind in ("teacher", "sample"):  # the weights, the state, in sampling the main feature, one block
        numbers = student if kind == "sample" else teacher["total"]
        return {"weights, bf16": 2.0 * numbers, "block at work": passing + (2 + 2 * (kind == "sample")) * wide}
    gpus = shard_over or gpus
    if lora:
        thin, gpus = lora_parameters(config, H, lora), 1
        student, fake = thin["own"] + thin["student"], thin["fake"]
    bf16, fp32 = 2, 4
    found = {
        "shared base, bf16": bool(lora) * bf16 * teacher["total"],
        "student, weights": fp32 * student / gpus,
        "student, AdamW": 2 * fp32 * student / gpus,
        "student, average": (not lora) * fp32 * student / gpus,
        "fake score, weights": stage2 * fp32 * fake / gpus,
        "fake score, AdamW": stage2 * 2 * fp32 * fake / gpus,
        "discriminator, weights and AdamW": stage2 * 3 * fp32 * disc,
        "teacher, bf16": (stage2 and not lora and not offload_teacher) * bf16 * teacher["total"] / (gpus if shard_teacher else 1),
        "gradients": fp32 * (fake / gpus + disc if kind == "critic" else student / gpus),
    }
    # Of the net that runs two blocks and, if trained, their gradients are whole (the next is fetched early); of the student all the while
    # its head and what is outside blocks.
    kept = (gpus > 1) * fp32 * (H * teacher["block"] + (1 + stage2) * (student - teacher["blocks"]))
    trained = (gpus > 1) * min(4, L) * fp32 * teacher["block"]
    frozen = (offload_teacher or (shard_teacher and gpus > 1)) * (min(2, L) * teacher["block"] + teacher["total"] - teacher["blocks"])
    found["gathered for use"] = kept + max(trained, stage2 * bf16 * frozen) + bf16 * teacher["block"]
    # (The last is autocast's copy of a block.) A checkpointed block keeps its input, and of attention the output and a number a head.
    # Fusion and output layer are not checkpointed: about 28 and 10 bytes a number. The block that runs backwards is whole: 4.3 GB at 1.3B,
    # 12.4 at 14B; compiled less, for AdaLN, norms and RoPE then keep little.
    live = n * ((36.3 if compiled else 68.5) * k["D"] + 4 * k["ffn_dim"])
    if lora:  # what is between A and B is kept, and for A the input of a layer becomes fp32 for a moment
        live += n * (16 * lora + 4 * k["ffn_dim"])
    attended = 2 * (bf16 * wide + fp32 * n * k["num_attention_heads"])  # of self- and of cross-attention
    rolled = 1 if kind == "stage1" else N  # head evaluations in the graph
    taps = (last_tap + 1) * (kind == "student" and disc > 0)
    blocks = L if kind == "critic" else L - H + rolled * H + taps
    work = {"none": 0.0, "selective": live - attended, "full": live}[checkpointing]
    found |= {"whole blocks": blocks * live} if checkpointing == "none" else {"block inputs": blocks * bf16 * wide}
    found["attention outputs"] = blocks * attended * (checkpointing == "selective")
    found["outside blocks"] = (10 if kind == "critic" or not H else rolled * 38) * wide
    # The critics' losses both have their graphs when the first is run backwards; in the student's step the discriminator's is over before.
    found["block and discriminator at work"] = {"critic": work + 2 * disc_bytes, "student": max(work, disc_bytes)}.get(kind, work)
    found["block in passing"] = passing
    if not accumulated:
        graph = sum(found[term] for term in ("whole blocks", "block inputs", "attention outputs", "outside blocks") if term in found)
        found["gradients"] = max(found["gradients"] - graph, 0.0)
    return {name: float(value) for name, value in found.items() if value}


def choose_checkpointing(config: dict, n_tokens: int, budget: float, kinds=("stage1", "student", "critic"), **held) -> str:
    """The first (the fastest) of CHECKPOINTING with which every step of `kinds` fits `budget` bytes, or "full"; `held` goes to memory."""
    need = lambda mode: max(sum(memory(config, n_tokens, kind, checkpointing=mode, **held).values()) for kind in kinds)
    return next((mode for mode in CHECKPOINTING[:-1] if need(mode) <= budget), CHECKPOINTING[-1])


# ---- The plan of a run -----------------------------------------------------------------------------------------------


def plan(model: str | dict = "1.3b", *, gpus: int = 8, card_gb: float = 141, tflops: float = 400, M: int = 2, N: int = 2, H: int = 5,
         frames: int = 81, height: int = 480, width: int = 832, batch: int = 64, micro_batch: int = 1, stage1: int | None = None,
         stage2: int | None = None, student_every: int = 5, last_tap: int | None = None, disc_width: int | None = None,
         disc_checkpointing: bool = False, shard_teacher: bool = True, flow_map_share: float = 0.25, fp32_slowdown: float = 2.0,
         clips: int = 500_000, text: int = 512, lora: int = 0, context_parallel: int = 1, checkpointing: str = "full",
         compiled: bool = False, shard_over: int = 0, offload_teacher: bool = False, rates: dict | None = None) -> dict:  # fmt: skip
    """Every number of the report. model: "1.3b", "14b" or a transformer's config; batch is the global one, micro_batch a card's.

    stage1, stage2 are updates and iterations, by default the paper's; H = 0 plans DMD2-v; lora is the rank of adapters on a shared
    base; checkpointing may be "auto"; rates are those of a measured card, used in place of tflops. RAISES ValueError on settings that
    cannot run.
    """
    settings = dict(gpus=gpus, card_gb=card_gb, tflops=tflops, M=M, N=N, H=H, frames=frames, height=height, width=width, batch=batch,
                    micro_batch=micro_batch, student_every=student_every, lora=lora, context_parallel=context_parallel)  # fmt: skip
    if isinstance(model, str) and model not in WAN:
        raise ValueError(f"model is {model!r}; choose one of {', '.join(map(repr, WAN))}, or give a transformer's config.")
    config = WAN[model] if isinstance(model, str) else model
    k = known(config)
    for field, value in {**settings, "clips": clips, "fp32_slowdown": fp32_slowdown}.items():
        if not (value > 0 or field == "H" or (field == "lora" and value == 0)) or value == math.inf:
            raise ValueError(f"{field} is {value}; it must be positive.")
    if shard_over and (shard_over < 0 or gpus % shard_over):
        raise ValueError(f"shard_over {shard_over} does not divide the {gpus} GPUs; change one of them, or 0 for all.")
    K, n = context_parallel, tokens(config, frames, height, width)
    for what, size in (("GPUs", gpus), ("heads", k["num_attention_heads"]), ("tokens of a clip", n)):
        if size % K:
            raise ValueError(f"context_parallel {K} does not divide the {size} {what}; change one of them.")
    if batch % (gpus // K * micro_batch):
        groups = f"{gpus} GPUs" if K == 1 else f"{gpus // K} groups of {K} GPUs"
        raise ValueError(f"a global batch of {batch} does not split over {groups}, {micro_batch} at a time on each; change one of them.")
    if student_every < 2:
        raise ValueError(f"student_every is {student_every}; it must be at least 2, for the critics train in between.")
    name = next((name for name, other in WAN.items() if known(other) == k), None)
    run = RUNS.get(name, RUNS["1.3b"] | {"disc_width": k["D"] // math.prod(k["patch_size"])})
    disc_width = run["disc_width"] if disc_width is None else disc_width
    kinds = ("stage1", "student", "critic") if H else ("student", "critic")  # DMD2-v has no stage 1, but at M = 1 a KD warm-up
    phases = ("stage1", "stage2") if H else ("kd", "stage2") if M == 1 else ("stage2",)
    paper = {"stage1": run["stage1"], "kd": run["kd"], "stage2": run["stage2"][M > 1]}
    iterations = paper | {name: given for name, given in (("stage1", stage1), ("stage2", stage2)) if given is not None}

    size, rate = latent(frames, height, width), rates or rates_of(tflops, fp32_slowdown)
    disc = discriminator(config, size, disc_width)
    shared = {"N": N, "H": H, "last_tap": last_tap, "lora": lora}
    kept = {"disc": disc["parameters"], "disc_bytes": disc["live" if disc_checkpointing else "kept"], "shard_teacher": shard_teacher}
    held = {"gpus": gpus, "micro_batch": micro_batch, "context_parallel": K, "compiled": compiled, "shard_over": shard_over}
    held |= {"offload_teacher": offload_teacher, "accumulated": batch > gpus // K * micro_batch, **shared, **kept}
    limit, chosen = card_gb * GB * (1 - RESERVE), checkpointing == "auto"
    if chosen:
        checkpointing = choose_checkpointing(config, n, limit, kinds, **held)
    memories = {kind: memory(config, n, kind, checkpointing=checkpointing, **held) for kind in kinds}
    peak = {kind: sum(terms.values()) for kind, terms in memories.items()}

    working = {"disc_flops": disc["flops"], "flow_map_share": flow_map_share, "text": text, "checkpointing": checkpointing}
    working["together"] = micro_batch * (1 if lora else gpus // K)  # with adapters cards meet once an update, not in every micro-batch
    works = {kind: step_work(config, n, kind, compiled=compiled, **shared, **working) for kind in (*kinds, "kd")}
    steps = {kind: step_flops(config, n, kind, fp32_slowdown=fp32_slowdown, **shared, **working) for kind in works}
    terms = {kind: {term: time_of(work, rate) for term, work in step.items()} for kind, step in works.items()}  # seconds of a clip
    whole = lambda term: term.startswith("discriminator")  # every card of a group does all of it
    card = {kind: sum(t if whole(term) else t / K for term, t in step.items()) for kind, step in terms.items()}
    seconds = {kind: batch // (gpus // K) * each for kind, each in card.items()}
    seconds["stage2"] = (seconds["student"] + (student_every - 1) * seconds["critic"]) / student_every
    grids = GRIDS if H else sorted({(M, 1) for M, _ in GRIDS})
    call = lambda kind, **how: step_work(config, n, kind, H=H, compiled=compiled, text=text, **how).values()
    sampling = {(m, j): sum(time_of(work, rate) for work in call("sample", M=m, N=j)) for m, j in grids}
    forward = sum(time_of(work, rate) for work in call("teacher"))
    teacher_sampling = 100 * forward  # 50 steps with guidance
    student, fake = student_parameters(config, H)["total"], parameters(config)["total"]
    thin = lora_parameters(config, H, lora)
    if lora:
        student, fake = thin["own"] + thin["student"], thin["fake"]
    return {
        "settings": settings,
        "name": name or "this transformer",
        "tokens": n,
        "L": k["num_layers"],
        "parameters": parameters(config),
        "student": student_parameters(config, H),
        "lora": thin,
        "discriminator": disc,
        "flops": flops(config, n, text, H),
        "steps": steps,
        "memory": memories,
        "peak": peak,
        "limit": limit,
        "checkpointing": checkpointing,
        "chosen": chosen,
        "terms": terms,
        "forward": forward,
        "fits": max(peak.values()) <= limit,
        "iterations": iterations,
        "seconds": seconds,
        "hours": {kind: iterations[kind] * seconds[kind] / 3600 for kind in phases},
        "sampling": sampling,
        "teacher sampling": teacher_sampling,
        "clips": clips,
        "clip hours": clips * teacher_sampling / 3600,
        "clip bytes": clips * 2 * (k["in_channels"] * math.prod(size) + text * k["text_dim"]),  # latents fp16, text embeddings bf16
        "checkpoint bytes": 16 * student + 12 * (fake + disc["parameters"]),  # of stage 2: weights, AdamW, the student's average
    }


def advice(model: str | dict = "1.3b", *, gpus: int = 8, batch: int = 64, frames: int = 81, **settings) -> str:
    """What to change where the plan does not fit: the fewest GPUs that do, the longest clip that does on these, both, or larger cards."""

    def fits(gpus, frames, **more):
        try:
            return plan(model, gpus=gpus, batch=batch, frames=frames, **settings | more)["fits"]
        except ValueError:  # cards that share a clip do not divide these heads, tokens or cards
            return False

    longest = lambda gpus: next((f for f in range(frames - 4, 16, -4) if fits(gpus, f)), None)  # 17 frames are a second
    K = settings.get("context_parallel", 1)
    most = K * batch // settings.get("micro_batch", 1)
    more = next((g for g in range(gpus + 1, most + 1) if most % g == 0 and fits(g, frames)), None)
    shorter = longest(gpus)
    ways = [f"take {more} GPUs, the fewest that do at this size"] if more else []
    ways += [f"keep {gpus} and shorten the clips to {shorter} frames"] if shorter else []
    if not ways and (shorter := longest(most)):
        ways = [f"take {most} GPUs and shorten the clips to {shorter} frames"]
    for words, change in (
        ("compute more again with --checkpointing auto", {"checkpointing": "auto"}),
        ("keep the teacher in host memory with --offload-teacher", {"offload_teacher": True}),
        ("cut the weights over all GPUs with --shard-over 0", {"shard_over": 0}),
    ):
        ways += [words] * fits(gpus, frames, **change)
    if cut := next((k for k in (2, 4, 8) if k > K and fits(gpus, frames, context_parallel=k)), None):
        ways += [f"cut each clip over {cut} GPUs with --context-parallel {cut}"]
    else:  # with more cards than these, but fewer than whole clips need
        pairs = ((g, k) for g in range(gpus + 1, more or most + 1) for k in (2, 4, 8) if k > K and fits(g, frames, context_parallel=k))
        ways += [f"take {g} GPUs and cut each clip over {k} of them with --context-parallel {k}" for g, k in islice(pairs, 1)]
    if not settings.get("lora") and fits(gpus, frames, lora=64):
        ways += ["train adapters on one shared base with --lora 64"]
    if not ways:
        return f"No number of such cards up to {most} helps: take larger cards, smaller pictures or the smaller model."
    return f"To make it fit, {', or '.join(ways)}."


def duration(seconds: float) -> str:
    """Seconds to three digits in the unit that reads best."""
    unit, size = next((u for u in (("days", 86400), ("h", 3600), ("min", 60)) if seconds >= 2 * u[1]), ("s", 1))
    return f"{seconds / size:,.3g} {unit}"


def report(model: str | dict = "1.3b", **settings) -> str:
    """The plan as text: what it needs, whether it fits and what to change, how long it takes. `settings` are plan's."""
    import tmd_minimal as tmd  # here, so that the arithmetic above needs no torch

    p = plan(model, **settings)
    s, whole, L = p["settings"], p["flops"]["whole"], p["L"]
    gpus, M, N, H = s["gpus"], s["M"], s["N"] if s["H"] else 1, s["H"]
    million, tera = (lambda n: f"{n / 1e6:,.1f} M"), (lambda n: f"{n / 1e12:,.4g}")
    titles = {"stage1": "stage 1", "student": "stage 2, student", "critic": "stage 2, critics"}
    columns = [kind for kind in titles if kind in p["memory"]]
    row = lambda label, cell: f"  {label:<42}" + "".join(f"{cell(kind):>18}" for kind in columns)
    names = lambda found, order: dict.fromkeys(term for kind in order for term in found[kind])
    table = lambda found, order, cell: [
        row(term, lambda kind, term=term: cell(found[kind][term]) if term in found[kind] else "") for term in names(found, order)
    ]
    added = p["student"]["total"] - p["student"]["teacher"]
    clip, cards = f"{s['frames']} frames of {s['height']}x{s['width']}", f"{gpus} GPU{'s' * (gpus > 1)} of {s['card_gb']:g} GB"
    trained = {"student": p["lora"]["own"] + p["lora"]["student"], "fake score": p["lora"]["fake"]}
    thin = [f"  LoRA of rank {s['lora']} on a shared base; trained: " + ", ".join(f"{who} {million(n)}" for who, n in trained.items())]
    thin = thin if s["lora"] else []
    K = s["context_parallel"]
    cut = f" {K} that share a clip" if K > 1 else ""
    source = f"Estimates from FLOP counts at {s['tflops']:g} TFLOP/s (bf16) a GPU, not measured."
    if rate := settings.get("rates"):
        speeds = ", ".join(f"{unit} {rate[unit] / 1e12:,.3g}" for unit in UNITS)
        source = f"Times from rates measured on {rate['on']}, in T/s:\n{speeds}."
    again = {"none": "nothing", "selective": "all but attention", "full": "all"}[p["checkpointing"]]
    verdict = lambda kind: "fits" if p["peak"][kind] <= p["limit"] else "TOO MUCH"

    lines = [
        f"Plan for {p['name']}: {'TMD' if H else 'DMD2-v'} with M = {M}, N = {N}, H = {H} of {L} blocks; clips of {clip}",
        f"({p['tokens']:,} tokens), a global batch of {s['batch']} on {cards}, {s['micro_batch']} at a time on each{cut}.",
        source,
        "Communication, optimizer steps, reading, VAE and text encoder are left out of the times, activations estimated. A GB: 2^30 bytes.",
        f"Checkpointing: {p['checkpointing']}{' (chosen: the fastest that fits)' * (p['chosen'] and p['fits'])}; the backward pass computes"
        f" {again} of a block again.",
        "",
        "Parameters",
        f"  teacher        {million(p['parameters']['total']):>12}   {L} blocks of {million(p['parameters']['block'])}",
        f"  student        {million(p['student']['total']):>12}   the teacher and {million(added)} of the flow head",
        f"  discriminator  {million(p['discriminator']['parameters']):>12}",
        *thin,
        "",
        f"One forward: {tera(whole['total'])} TFLOP ({tera(whole['linear'])} linear, {tera(whole['attention'])} attention)"
        + (f"; backbone {tera(p['flops']['backbone']['total'])}, flow head {tera(p['flops']['head']['total'])}." if H else "."),
        "",
        row("Memory on each GPU, GB", titles.get),
        *table(p["memory"], reversed(columns), lambda size: f"{size / GB:,.1f}"),
        row("total", lambda kind: f"{p['peak'][kind] / GB:,.1f}"),
        row(f"of {p['limit'] / GB:,.1f} (the card less {100 * RESERVE:g} %)", verdict),
        "",
        "It fits." if p["fits"] else f"IT DOES NOT FIT. {advice(model, **settings)}",
        "",
        row("One clip's step, in forwards of the teacher", titles.get),
        *table(p["terms"], columns, lambda t: f"{t / p['forward']:.2f}"),
        row("total", lambda kind: f"{sum(p['terms'][kind].values()) / p['forward']:.2f}"),
        row("seconds for the whole batch", lambda kind: f"{p['seconds'][kind]:,.3g}"),
        "",
        "Training",
    ]
    each_kind = {"stage1": "updates", "kd": "updates", "stage2": f"iterations, one in {s['student_every']} the student's,"}
    for kind, hours in p["hours"].items():
        count, each = p["iterations"][kind], p["seconds"][kind]
        lines += [f"  {kind}: {count:,} {each_kind[kind]} of {each:,.3g} s = {duration(3600 * hours)}, {hours * gpus:,.0f} GPU-hours"]
    total = sum(p["hours"].values())
    lines += [
        f"  in all {duration(3600 * total)}, {total * gpus:,.0f} GPU-hours",
        f"  a checkpoint of stage2 takes {p['checkpoint bytes'] / GB:,.3g} GB",
        "",
        "Sampling one clip on one GPU, transformer only",
    ]
    for (m, j), t in p["sampling"].items():
        lines += [f"  M = {m}, N = {j}: {duration(t):>9}   effective NFE {tmd.effective_nfe(m, j, H, L):.2f}"]
    lines += [
        f"  teacher, 50 x 2: {duration(p['teacher sampling'])}",
        "",
        f"Data: {p['clips']:,} clips take {p['clip bytes'] / GB:,.4g} GB (latents in fp16, text embeddings in bf16 at full length);",
        f"generating them with this teacher takes {p['clip hours']:,.1f} GPU-hours more.",
    ]
    return "\n".join(lines) + "\n"
