"""Does a run fit, how long does it take, and what to change where it does not fit: before anything is loaded.

    plan("1.3b", gpus=8, card_gb=80)["fits"]       # or plan(json.load(open("transformer/config.json")), ...)

Arithmetic on a transformer's config alone: it needs neither weights nor torch. report.py writes it as text.
"""

from __future__ import annotations

import math
from itertools import islice

from wan_scale.cost.memory import RESERVE, choose_checkpointing, memory
from wan_scale.cost.sizes import (
    GB,
    WAN,
    discriminator,
    known,
    latent,
    lora_parameters,
    parameters,
    student_parameters,
    tokens,
)
from wan_scale.cost.work import FP32_SLOWDOWN, flops, rates_of, step_flops, step_work, time_of

# Table 7: updates of stage 1, iterations of stage 2 at M = 1 and M >= 2, updates of DMD2-v's KD warm-up; width of the
# discriminator's convolutions.
RUNS = {
    "1.3b": {"stage1": 3000, "stage2": (12000, 4000), "kd": 10000, "disc_width": 384},
    "14b": {"stage1": 3000, "stage2": (5000, 1000), "kd": 5000, "disc_width": 608},
}
GRIDS = (1, 1), (1, 2), (1, 4), (2, 2), (2, 4)  # (M, N) of the sampling table


def plan(model: str | dict = "1.3b", *, gpus: int = 8, card_gb: float = 141, tflops: float = 400, M: int = 2,
         N: int = 2, H: int = 5, frames: int = 81, height: int = 480, width: int = 832, batch: int = 64,
         micro_batch: int = 1, stage1: int | None = None, stage2: int | None = None, student_every: int = 5,
         last_tap: int | None = None, disc_width: int | None = None, disc_checkpointing: bool = False,
         shard_teacher: bool = True, flow_map_share: float = 0.25, fp32_slowdown: float = FP32_SLOWDOWN,
         tf32: bool = False, clips: int = 500_000, text: int = 512, lora: int = 0, context_parallel: int = 1,
         checkpointing: str = "full", compiled: bool = False, shard_over: int = 0, offload_teacher: bool = False,
         ema_on_host: bool = False, rates: dict | None = None) -> dict:  # fmt: skip
    """Every number of the report.

    model: "1.3b", "14b" or a transformer's config. batch: clips an update; micro_batch: clips a GPU holds at once.
    stage1, stage2: updates and iterations, by default the paper's. H = 0 plans DMD2-v. lora: rank of adapters on a
    shared base. checkpointing may be "auto". card_gb: memory of a GPU. fp32_slowdown, tf32: as in rates_of. rates: of a
    measured GPU (measured_rates), in place of tflops and these. RAISES ValueError on settings that cannot run.
    """
    settings = dict(gpus=gpus, card_gb=card_gb, tflops=tflops, M=M, N=N, H=H, frames=frames, height=height, width=width,
                    batch=batch, micro_batch=micro_batch, student_every=student_every, lora=lora,
                    context_parallel=context_parallel)  # fmt: skip
    if isinstance(model, str) and model not in WAN:
        known_ones = ", ".join(map(repr, WAN))
        raise ValueError(f"model is {model!r}; choose one of {known_ones}, or give a transformer's config.")
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
        uneven = f"does not split over {groups}, {micro_batch} at a time on each"
        raise ValueError(f"a global batch of {batch} {uneven}; change one of them.")
    if student_every < 2:
        raise ValueError(f"student_every is {student_every}; it must be at least 2, for the critics train in between.")
    name = next((name for name, other in WAN.items() if known(other) == k), None)
    run = RUNS.get(name, RUNS["1.3b"] | {"disc_width": k["D"] // math.prod(k["patch_size"])})
    disc_width = run["disc_width"] if disc_width is None else disc_width
    # DMD2-v has no stage 1, but at M = 1 a KD warm-up
    kinds = ("stage1", "student", "critic") if H else ("student", "critic")
    phases = ("stage1", "stage2") if H else ("kd", "stage2") if M == 1 else ("stage2",)
    paper = {"stage1": run["stage1"], "kd": run["kd"], "stage2": run["stage2"][M > 1]}
    iterations = paper | {name: given for name, given in (("stage1", stage1), ("stage2", stage2)) if given is not None}

    size, rate = latent(frames, height, width), rates or rates_of(tflops, fp32_slowdown, tf32)
    disc = discriminator(config, size, disc_width)
    shared = {"N": N, "H": H, "last_tap": last_tap, "lora": lora}
    held = dict(gpus=gpus, micro_batch=micro_batch, context_parallel=K, compiled=compiled, shard_over=shard_over,
                shard_teacher=shard_teacher, offload_teacher=offload_teacher, ema_on_host=ema_on_host,
                disc=disc["parameters"], disc_bytes=disc["features" if disc_checkpointing else "kept"],
                disc_live=disc["live"] if disc_checkpointing else 0.0,
                accumulated=batch > gpus // K * micro_batch, **shared)  # fmt: skip
    limit, chosen = card_gb * GB * (1 - RESERVE), checkpointing == "auto"
    if chosen:
        checkpointing = choose_checkpointing(config, n, limit, kinds, **held)
    memories = {kind: memory(config, n, kind, checkpointing=checkpointing, **held) for kind in kinds}
    peak = {kind: sum(terms.values()) for kind, terms in memories.items()}

    working = dict(disc_flops=disc["flops"], flow_map_share=flow_map_share, text=text, checkpointing=checkpointing,
                   together=micro_batch, disc_checkpointing=disc_checkpointing)  # fmt: skip
    works = {kind: step_work(config, n, kind, compiled=compiled, **shared, **working) for kind in (*kinds, "kd")}
    slow = {"fp32_slowdown": fp32_slowdown, "tf32": tf32}
    steps = {kind: step_flops(config, n, kind, **slow, **shared, **working) for kind in works}
    in_seconds = lambda step: {term: time_of(work, rate) for term, work in step.items()}
    terms = {kind: in_seconds(step) for kind, step in works.items()}  # of one clip
    whole = lambda term: term.startswith("discriminator")  # every GPU of a group does all of it
    each_gpu = {kind: sum(t if whole(term) else t / K for term, t in step.items()) for kind, step in terms.items()}
    seconds = {kind: batch // (gpus // K) * each for kind, each in each_gpu.items()}
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
        "clip bytes": clips
        * 2
        * (k["in_channels"] * math.prod(size) + text * k["text_dim"]),  # latents fp16, text embeddings bf16
        "checkpoint bytes": 16 * student
        + 12 * (fake + disc["parameters"]),  # of stage 2: weights, AdamW, the student's EMA
    }


def advice(model: str | dict = "1.3b", *, gpus: int = 8, batch: int = 64, frames: int = 81, **settings) -> str:
    """What to change where the plan does not fit: the fewest GPUs that do, the longest clip that does on these, both,
    or larger GPUs.
    """

    def fits(gpus, frames, **more):
        try:
            return plan(model, gpus=gpus, batch=batch, frames=frames, **settings | more)["fits"]
        except ValueError:  # GPUs that share a clip do not divide these heads, tokens or GPUs
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
        ("take more activation checkpointing with --checkpointing auto", {"checkpointing": "auto"}),
        ("keep the teacher in host memory with --offload-teacher", {"offload_teacher": True}),
        ("shard the weights over all GPUs with --shard-over 0", {"shard_over": 0}),
    ):
        ways += [words] * fits(gpus, frames, **change)
    if cut := next((k for k in (2, 4, 8) if k > K and fits(gpus, frames, context_parallel=k)), None):
        ways += [f"split each clip over {cut} GPUs with --context-parallel {cut}"]
    else:  # with more GPUs than these, but fewer than whole clips need
        pairs = ((g, k) for g in range(gpus + 1, more or most + 1) for k in (2, 4, 8) if k > K)
        work = ((g, k) for g, k in pairs if fits(g, frames, context_parallel=k))
        for g, k in islice(work, 1):
            ways += [f"take {g} GPUs and split each clip over {k} of them with --context-parallel {k}"]
    if not settings.get("lora") and fits(gpus, frames, lora=64):
        ways += ["train adapters on one shared base with --lora 64"]
    if not ways:
        return f"No number of such GPUs up to {most} helps: take larger GPUs, smaller frames or the smaller model."
    return f"To make it fit, {', or '.join(ways)}."


def duration(seconds: float) -> str:
    """Seconds to three digits in the unit that reads best."""
    unit, size = next((u for u in (("days", 86400), ("h", 3600), ("min", 60)) if seconds >= 2 * u[1]), ("s", 1))
    return f"{seconds / size:,.3g} {unit}"
