"""The work of a step, and the seconds that a GPU takes for it.

FLOPs count 2 a multiply-add. A step calls what tmd_minimal's losses call. Work is counted by unit (UNITS), because a
GPU does each at its own rate. `bench` measures the rates (measured_rates); else one stands for all (rates_of).
"""

from __future__ import annotations

import math

from wan_scale.cost.sizes import known, student_parameters

# Activation checkpointing of a block, the fastest first: a block keeps everything, attention's output, its input.
CHECKPOINTING = ("none", "selective", "full")
# What a GPU does at its own rates: FLOPs of linear layers (forward, gradients of inputs), gradients of their weights,
# of attention and its gradient, of the discriminator, of float32 passes; bytes that elementwise work reads and writes.
UNITS = ("linear", "weight gradients", "attention", "attention backward", "convolution", "fp32 linear",
         "fp32 attention", "bytes")  # fmt: skip
# Bytes that elementwise work moves in the (forward, backward) pass, counted on the stock block under bf16 autocast:
MOVED = {False: (354, 737), True: (42, 117)}  # for a number of a block's hidden state; compiled or not
MOVED_OUTSIDE, MOVED_WIDE = (116, 215), (4, 8)  # for one in the head's fusion and output layer; in the feed-forward
# choice: float32 runs at an eighth of the bf16 rate, linear layers with TF32 at half of it (data sheets, not measured)
FP32_SLOWDOWN, TF32_SLOWDOWN = 8.0, 2.0


def flops(config: dict, n_tokens: int, text: int = 512, H: int = 5) -> dict[str, dict[str, float]]:
    """FLOPs of one forward of one clip: part -> {"linear", "attention", "total"}.

    Parts of the teacher: "block" (one), "embeddings", "output", "whole". Parts of the student: "backbone" (first L-H
    blocks), "head" (last H, with the fusion), and "backbone rest", "head rest" (of these, what is outside the blocks).
    With H = 0 the backbone is the whole.
    """
    k, n = known(config), n_tokens
    D, L, patch = k["D"], k["num_layers"], math.prod(k["patch_size"])
    student_parameters(config, H)  # checks H
    block = 2 * D * D * (6 * n + 2 * text) + 4 * n * D * k["ffn_dim"], 4 * n * D * (n + text)
    time, modulation = 2 * D * (k["freq_dim"] + D), 12 * D * D
    patches, words = 2 * n * k["in_channels"] * patch * D, 2 * text * D * (k["text_dim"] + D)
    output = 2 * n * D * k["out_channels"] * patch
    embeddings = patches + words + time + modulation
    # s and s - r; modulated for fusion and for blocks
    head_rest = patches + 2 * time + 2 * modulation + 8 * n * D * D + output if H else 0
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


def step_work(config: dict, n_tokens: int, kind: str, *, N: int = 2, H: int = 5, M: int = 1,
              last_tap: int | None = None, guidance: bool = True, gan: bool = True, disc_flops: float = 0.0,
              flow_map_share: float = 0.25, together: int = 1, attention_backward: float = 2.5, text: int = 512,
              lora: int = 0, checkpointing: str = "full", compiled: bool = False, disc_checkpointing: bool = False
              ) -> dict[str, dict[str, float]]:  # fmt: skip
    """Work of one micro-batch of one clip, by what is evaluated and by unit: {term: {unit: FLOPs, or bytes}}.

    kind: "stage1", "student" and "critic" (stage 2), "kd", "sample" (tmd.sample, M transitions), "teacher" (one
    forward). H = 0, N = 1 is DMD2-v.
    together: clips of a micro-batch. If one of them needs stage 1's finite difference (r < s), it is made for all.
    attention_backward: forwards of attention that its gradient costs. Fused kernels compute the scores twice (2.5),
    plain ones do not (2).
    lora: the weights of a block take no gradient. The adapters' own products are left out: about 2 % of a block's
    linear ones at rank 64.
    disc_checkpointing: the discriminator's branches run forward once more in the backward pass.
    """
    known_mode(checkpointing)
    k, part = known(config), flops(config, n_tokens, text, H)
    L, n, (forward, backward), (wide, wide_backward) = k["num_layers"], n_tokens, MOVED[compiled], MOVED_WIDE
    last_tap = L - 1 if last_tap is None else last_tap
    if not 0 <= last_tap < L:
        raise ValueError(f"the last feature block is {last_tap}; give one of blocks 0 to {L - 1}.")
    linear, attention = part["block"]["linear"], part["block"]["attention"]
    moved = n * (forward * k["D"] + wide * k["ffn_dim"])
    moved_back = n * (backward * k["D"] + wide_backward * k["ffn_dim"])

    def cost(blocks: int, rest: float, gradient: str = "none", outside: int = 0, times: float = 1,
             redone: float = 0) -> dict[str, float]:  # fmt: skip
        """Forward; for a gradient, also checkpointed blocks and what is `redone` of the rest once more, gradients of
        inputs, for "all" of weights.
        """
        inputs, weights = {"none": (0, 0), "inputs": (1, 0), "all": (1, 1)}[gradient]
        again, attend = inputs * (checkpointing != "none"), inputs * (checkpointing == "full")
        found = {
            "linear": blocks * (1 + again + inputs) * linear + (1 + inputs) * rest + again * redone,
            "weight gradients": weights * (blocks * linear + rest),
            "attention": blocks * (1 + attend) * attention,
            # attention has no weights: "inputs" saves nothing
            "attention backward": inputs * blocks * attention_backward * attention,
            "bytes": blocks * ((1 + again) * moved + inputs * moved_back) + outside * n * k["D"],
        }
        return {unit: times * amount for unit, amount in found.items()}

    last = part["output"]["total"]
    ends, fusion = part["embeddings"]["total"] + last, 8 * n * k["D"] ** 2 + last
    # with a gradient fusion and output layer, too, run forward once more, if blocks do
    back = MOVED_OUTSIDE[1] + (checkpointing != "none") * MOVED_OUTSIDE[0]
    fused = lambda gradient: (H > 0) * (MOVED_OUTSIDE[0] + (gradient != "none") * back)
    backbone = lambda gradient="none", times=1: cost(
        L - H, part["backbone rest"]["total"], gradient, times=times, redone=0 if H else last
    )
    head = lambda gradient="none", times=1: cost(
        H, part["head rest"]["total"], gradient, fused(gradient), times, redone=fusion if H else 0
    )
    teacher = lambda gradient="none", times=1: cost(L, ends, gradient, times=times, redone=last)
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
            "discriminator, with input gradient": convolution((2 + disc_checkpointing) * gan),
        }
    elif kind == "critic":
        found = {
            "backbone": backbone(),
            f"head x {N}": head(times=N),
            "fake score, trained": teacher(trained),
            "teacher's features, real and fake": features(times=2 * gan),
            "discriminator, trained": convolution((6 + 2 * disc_checkpointing) * gan),
        }
    else:
        raise ValueError(f"kind is {kind!r}; choose one of 'stage1', 'student', 'critic', 'kd', 'sample', 'teacher'.")
    some = lambda work: {unit: float(v) for unit, v in work.items() if v}
    return {term: some(work) for term, work in found.items() if any(work.values())}


def step_flops(config: dict, n_tokens: int, kind: str, *, fp32_slowdown: float = 2.0, tf32: bool = False,
               **how) -> dict[str, float]:  # fmt: skip
    """FLOPs of step_work by term. fp32 ones count as often as rates_of says: one bf16 rate then divides them all."""
    one = rates_of(1e-12, fp32_slowdown, tf32)
    return {term: time_of(work, one) for term, work in step_work(config, n_tokens, kind, **how).items()}


def known_mode(checkpointing: str) -> None:
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing is {checkpointing!r}; choose one of {', '.join(map(repr, CHECKPOINTING))}.")


# ---- Rates: from work to seconds -------------------------------------------------------------------------------------


def rates_of(tflops: float, fp32_slowdown: float, tf32: bool = False) -> dict[str, float]:
    """Units of work a second where no GPU was measured: one bf16 rate for everything, elementwise work for nothing.

    Float32 is `fp32_slowdown` times slower. With tf32 its linear layers are TF32_SLOWDOWN times slower, attention as
    slow as before: its kernels need not follow the flag.
    """
    rate = {unit: tflops * 1e12 for unit in UNITS} | {"bytes": math.inf}
    slower = {"fp32 linear": TF32_SLOWDOWN if tf32 else fp32_slowdown, "fp32 attention": fp32_slowdown}
    return rate | {unit: tflops * 1e12 / times for unit, times in slower.items()}


def measured_rates(record: dict, tf32: bool = False, attn: str | None = None) -> dict:
    """Units of work a second as `bench` measured them, and {"on": where}.

    attn: the attention backend; without it the one that `bench` took. RAISES ValueError where the record lacks a rate.
    """
    cases, attn = record.get("cases", {}), attn or record.get("attn")
    try:
        return rates_of_cases(record, cases, tf32, attn)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as e:
        raise ValueError("--rates is not what `bench` writes; give a JSON that it wrote, or --tflops.") from e


def rates_of_cases(record: dict, cases: dict, tf32: bool, attn: str | None) -> dict:
    """measured_rates of a record that is whole."""
    seconds, work = ({**cases.get(case, {}).get(key, {})} for case, key in (("rates", "seconds"), ("rates", "work")))
    attention = cases.get("attention", {}).get("seconds", {})
    if attn in attention and f"{attn}, with backward" in attention:
        products, forward = 4 * record["tokens"] ** 2 * known(record["config"])["D"], attention[attn]
        backward = max(attention[f"{attn}, with backward"] - forward, forward)  # it computes more: less would be noise
        seconds |= {"attention": forward, "attention backward": backward}
        work |= {"attention": products, "attention backward": 2.5 * products}
    if missing := [unit for unit in UNITS if unit not in seconds]:
        absent = ", ".join(missing)
        raise ValueError(f"this file has no measured rate of {absent}; give a JSON that `bench` wrote, or --tflops.")
    name = lambda unit: f"{unit}, TF32" if tf32 and unit.startswith("fp32") else unit
    found = {unit: work[name(unit)] / seconds[name(unit)] for unit in UNITS}
    return found | {"on": f"{record['card']} with the shapes of {record['size']}, {record['date']}"}


def time_of(work: dict[str, float], rate: dict) -> float:
    """Seconds that a GPU of these rates takes for work {unit: amount}, one unit after the other."""
    return sum(amount / rate[unit] for unit, amount in work.items())
