"""Does it fit, and how long does it take: parameters, memory, FLOPs and hours of a run, before anything is loaded.

    print(report("1.3b", gpus=8, card_gb=80))                        # or report(json.load(open("transformer/config.json")), ...)

Arithmetic on a transformer's config alone, so it needs neither weights nor torch. FLOPs count 2 a multiply-add, as (linear, attention).
What a step calls is what tmd_minimal's losses call, with every block recomputed in the backward pass; a GB is 2^30 bytes.
"""

from __future__ import annotations

import math

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


def step_flops(config: dict, n_tokens: int, kind: str, *, N: int = 2, H: int = 5, M: int = 1, last_tap: int | None = None,
               guidance: bool = True, gan: bool = True, disc_flops: float = 0.0, flow_map_share: float = 0.25,
               fp32_slowdown: float = 2.0, attention_backward: float = 2.5, text: int = 512,
               lora: int = 0) -> dict[str, float]:  # fmt: skip
    """FLOPs of one micro-batch of one clip, by what is evaluated (the values add up to the step).

    kind: "stage1" | "student" and "critic" (stage 2) | "kd" | "sample" (tmd.sample, M transitions) | "teacher" (one forward). H = 0, N = 1
    is DMD2-v. fp32 passes count `fp32_slowdown` times, so that all can be divided by one bf16 rate. attention_backward: how many forwards
    of it its gradient costs; fused kernels recompute the scores (2.5), plain ones do not (2). Under adapters (lora) the weights of a block
    take no gradient; the adapters' own products, about 2 % of a block's linear ones at rank 64, are left out.
    """
    part, L = flops(config, n_tokens, text, H), known(config)["num_layers"]
    last_tap = L - 1 if last_tap is None else last_tap
    if not 0 <= last_tap < L:
        raise ValueError(f"the last feature block is {last_tap}; give one of blocks 0 to {L - 1}.")
    block = part["block"]["linear"], part["block"]["attention"]

    def cost(blocks: int, rest: float, gradient: str = "none") -> float:
        """Forward, and for a gradient the recomputed forward of the blocks, the gradient of inputs and, for "all", of weights."""
        again, backward = {"none": (0, 0), "inputs": (1, 1), "all": (1, 2)}[gradient]
        attention = (1 + again * (1 + attention_backward)) * block[1]  # it has no weights: "inputs" saves nothing
        return blocks * ((1 + again + backward) * block[0] + attention) + (1 + backward) * rest

    backbone = lambda gradient="none": cost(L - H, part["backbone rest"]["total"], gradient)
    head = lambda gradient="none": cost(H, part["head rest"]["total"], gradient)
    teacher = lambda gradient="none": cost(L, part["embeddings"]["total"] + part["output"]["total"], gradient)
    features = lambda gradient="none": cost(last_tap + 1, part["embeddings"]["total"], gradient)

    trained = "inputs" if lora else "all"
    if kind == "teacher":
        found = {"teacher": teacher()}
    elif kind == "sample":
        found = {"backbone": M * backbone(), "head": M * N * head()}
    elif kind == "kd":
        found = {"backbone, trained": backbone(trained), "head, trained": N * head("all")}
    elif kind == "stage1":
        found = {
            "backbone, trained": backbone(trained),
            "head, trained": head("all"),
            "pass for c_neg": guidance * (backbone() + head()),
            "finite difference, fp32": (flow_map_share > 0) * 2 * head() * fp32_slowdown,  # whatever r and s are
        }
    elif kind == "student":
        found = {
            "backbone, trained": backbone(trained),
            f"head x {N}, trained": N * head("all"),
            "fake score": teacher(),
            "teacher, guided": (1 + guidance) * teacher(),
            "teacher's features, with input gradient": gan * features("inputs"),
            "discriminator, with input gradient": gan * 2 * disc_flops,
        }
    elif kind == "critic":
        found = {
            "backbone": backbone(),
            f"head x {N}": N * head(),
            "fake score, trained": teacher(trained),
            "teacher's features, real and fake": gan * 2 * features(),
            "discriminator, trained": gan * 6 * disc_flops,
        }
    else:
        raise ValueError(f"kind is {kind!r}; choose one of 'stage1', 'student', 'critic', 'kd', 'sample', 'teacher'.")
    return {name: float(value) for name, value in found.items() if value}


# ---- Memory ----------------------------------------------------------------------------------------------------------


def memory(config: dict, n_tokens: int, kind: str, *, gpus: int = 1, N: int = 2, H: int = 5, last_tap: int | None = None,
           disc: float = 0.0, disc_bytes: float = 0.0, shard_teacher: bool = True, micro_batch: int = 1,
           lora: int = 0, context_parallel: int = 1) -> dict[str, float]:  # fmt: skip
    """Bytes on each card at the peak of a step of `kind` ("stage1", "student", "critic"), by term.

    Trained nets: fp32 weights, gradients and AdamW's moments, sharded over `gpus` (FSDP2); the discriminator is whole on every card, so is
    the teacher (bf16) unless `shard_teacher`. Gradients exist only of the net being updated. disc: its parameters; disc_bytes: what one of
    its forwards keeps of a clip. Cards that share a clip hold 1 / context_parallel of its hidden states, and its features whole.
    With lora, the adapters' rank, every card holds the base and all that is trained, the host the average.
    ACTIVATIONS ARE AN ESTIMATE: what PyTorch saves uncompiled, in bf16 autocast without its cache of casts.
    """
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}; it must be at least 1.")
    if kind not in ("stage1", "student", "critic"):
        raise ValueError(f"kind is {kind!r}; choose one of 'stage1', 'student', 'critic'.")
    k, teacher = known(config), parameters(config)
    L, n = k["num_layers"], micro_batch * n_tokens // context_parallel
    wide, disc_bytes = n * k["D"], micro_batch * disc_bytes  # wide: numbers in one hidden state
    last_tap = L - 1 if last_tap is None else last_tap
    student, fake, stage2 = student_parameters(config, H)["total"], teacher["total"], kind != "stage1"
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
        "teacher, bf16": (stage2 and not lora) * bf16 * teacher["total"] / (gpus if shard_teacher else 1),
        "gradients": fp32 * (fake / gpus + disc if kind == "critic" else student / gpus),
    }
    # Two blocks and their gradients are whole at a time (the next is fetched early), the root's weights all the while.
    trained = min(4, L) * fp32 * teacher["block"] + (1 + stage2) * fp32 * (student - teacher["blocks"])
    frozen = stage2 * shard_teacher * bf16 * (min(2, L) * teacher["block"] + teacher["total"] - teacher["blocks"])
    found["gathered for use"] = (trained + frozen) * (gpus > 1) + bf16 * teacher["block"]  # and autocast's copy of a block
    # A checkpointed block keeps its input: bf16 in the backbone, fp32 in the head, whose fusion is computed in fp32. Fusion and output
    # layer are not checkpointed: about 28 and 10 bytes a number. The block that runs backwards is whole: 4.3 GB at 1.3B, 12.4 at 14B.
    live = n * (68.5 * k["D"] + 4 * k["ffn_dim"])
    if lora:  # what is between A and B is kept, and for A the input of a layer becomes fp32 for a moment
        live += n * (16 * lora + 4 * k["ffn_dim"])
    rolled = 1 if kind == "stage1" else N  # head evaluations in the graph
    outside = (rolled * 38 if H else 10) * wide
    graph = ((L - H) * bf16 + rolled * H * fp32) * wide
    if kind == "critic":  # both losses' graphs exist when the first is run backwards
        found |= {"block inputs": L * bf16 * wide, "outside blocks": 10 * wide, "block and discriminator at work": live + 2 * disc_bytes}
    elif kind == "student":  # the discriminator's backward pass is over before a block's begins
        taps = (last_tap + 1) * bf16 * wide * (disc > 0)
        found |= {"block inputs": graph + taps, "outside blocks": outside, "block and discriminator at work": max(live, disc_bytes)}
    else:
        found |= {"block inputs": graph, "outside blocks": outside, "block and discriminator at work": live}
    return {name: float(value) for name, value in found.items() if value}


# ---- The plan of a run -----------------------------------------------------------------------------------------------


def plan(model: str | dict = "1.3b", *, gpus: int = 8, card_gb: float = 141, tflops: float = 400, M: int = 2, N: int = 2, H: int = 5,
         frames: int = 81, height: int = 480, width: int = 832, batch: int = 64, micro_batch: int = 1, stage1: int | None = None,
         stage2: int | None = None, student_every: int = 5, last_tap: int | None = None, disc_width: int | None = None,
         disc_checkpointing: bool = False, shard_teacher: bool = True, flow_map_share: float = 0.25, fp32_slowdown: float = 2.0,
         clips: int = 500_000, text: int = 512, lora: int = 0, context_parallel: int = 1) -> dict:  # fmt: skip
    """Every number of the report. model: "1.3b", "14b" or a transformer's config; batch is the global one, micro_batch a card's.

    stage1, stage2 are updates and iterations, by default the paper's; H = 0 plans DMD2-v; lora is the rank of adapters on a shared
    base. RAISES ValueError on settings that cannot run.
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

    size, second = latent(frames, height, width), tflops * 1e12
    disc = discriminator(config, size, disc_width)
    shared = {"N": N, "H": H, "last_tap": last_tap, "lora": lora}
    kept = {"disc": disc["parameters"], "disc_bytes": disc["live" if disc_checkpointing else "kept"], "shard_teacher": shard_teacher}
    working = {"disc_flops": disc["flops"], "flow_map_share": flow_map_share, "fp32_slowdown": fp32_slowdown, "text": text}
    steps = {kind: step_flops(config, n, kind, **shared, **working) for kind in (*kinds, "kd")}
    held = {"gpus": gpus, "micro_batch": micro_batch, "context_parallel": K}
    memories = {kind: memory(config, n, kind, **held, **shared, **kept) for kind in kinds}
    peak, limit = {kind: sum(terms.values()) for kind, terms in memories.items()}, card_gb * GB * (1 - RESERVE)

    whole = lambda term: term.startswith("discriminator")  # every card of a group does all of it
    card = {kind: sum(cost if whole(term) else cost / K for term, cost in step.items()) for kind, step in steps.items()}  # FLOPs of a clip
    seconds = {kind: batch // (gpus // K) * each / second for kind, each in card.items()}
    seconds["stage2"] = (seconds["student"] + (student_every - 1) * seconds["critic"]) / student_every
    grids = GRIDS if H else sorted({(M, 1) for M, _ in GRIDS})
    sampling = {(m, j): sum(step_flops(config, n, "sample", M=m, N=j, H=H, text=text).values()) / second for m, j in grids}
    teacher_sampling = 100 * flops(config, n, text, H)["whole"]["total"] / second  # 50 steps with guidance
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
    if cut := next((k for k in (2, 4, 8) if k > K and fits(gpus, frames, context_parallel=k)), None):
        ways += [f"cut each clip over {cut} GPUs with --context-parallel {cut}"]
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
    verdict = lambda kind: "fits" if p["peak"][kind] <= p["limit"] else "TOO MUCH"

    lines = [
        f"Plan for {p['name']}: {'TMD' if H else 'DMD2-v'} with M = {M}, N = {N}, H = {H} of {L} blocks; clips of {clip}",
        f"({p['tokens']:,} tokens), a global batch of {s['batch']} on {cards}, {s['micro_batch']} at a time on each{cut}.",
        f"Estimates from FLOP counts at {s['tflops']:g} TFLOP/s (bf16) a GPU, not measured. Communication, optimizer steps, reading, VAE",
        "and text encoder are left out of the times; activations are estimated. 1 GB = 2^30 bytes.",
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
        *table(p["steps"], columns, lambda cost: f"{cost / whole['total']:.2f}"),
        row("total", lambda kind: f"{sum(p['steps'][kind].values()) / whole['total']:.2f}"),
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
