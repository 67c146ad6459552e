"""How much memory a step takes on each GPU, by term, and which activation checkpointing fits."""

from __future__ import annotations

from wan_scale.cost.sizes import known, lora_parameters, parameters, student_parameters
from wan_scale.cost.work import CHECKPOINTING, known_mode

PROMPT = 512  # tokens of a prompt
RESERVE = 0.08  # of a GPU's memory: CUDA's context, NCCL's buffers, what the allocator wastes


def moments(config: dict, n_tokens: int, kind: str, *, gpus: int = 1, N: int = 2, H: int = 5,
            last_tap: int | None = None, disc: float = 0.0, disc_bytes: float = 0.0, disc_live: float = 0.0,
            shard_teacher: bool = True, micro_batch: int = 1, lora: int = 0, context_parallel: int = 1,
            checkpointing: str = "full", compiled: bool = False, shard_over: int = 0, offload_teacher: bool = False,
            accumulated: bool = True, ema_on_host: bool = False) -> dict[str, dict[str, float]]:  # fmt: skip
    """{moment: {term: bytes on each GPU}} where a step may have its peak: at the ends of its backward passes.

    kind: "stage1", "student", "critic", or, all in bf16, "teacher" and "sample".
    Trained nets have fp32 weights, gradients and AdamW's moments, sharded over `gpus` (FSDP2). With `shard_over` they
    are sharded over so many GPUs, and the other GPUs hold further copies. The discriminator is whole on every GPU. So
    is the teacher (bf16) unless `shard_teacher`; with `offload_teacher` the host has it.
    Only the net being updated has gradients. Where they are not `accumulated` over micro-batches, they come as the
    graph goes. disc: the discriminator's parameters; disc_bytes: what one of its forwards keeps of a
    clip; disc_live: what one branch adds while it runs backwards.
    GPUs that share a clip hold 1 / context_parallel of its hidden states, and its features whole. With lora (the
    adapters' rank) every GPU holds the base and all that is trained, and the host holds the EMA,
    as it does with ema_on_host.
    ACTIVATIONS ARE AN ESTIMATE: what PyTorch saves on CPU, in bf16 autocast without its cache of casts.
    """
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}; it must be at least 1.")
    if kind not in ("stage1", "student", "critic", "teacher", "sample"):
        raise ValueError(f"kind is {kind!r}; choose one of 'stage1', 'student', 'critic', 'teacher', 'sample'.")
    known_mode(checkpointing)
    k, teacher = known(config), parameters(config)
    L, n = k["num_layers"], micro_batch * n_tokens // context_parallel
    wide, disc_bytes, disc_live = n * k["D"], micro_batch * disc_bytes, micro_batch * disc_live
    last_tap = L - 1 if last_tap is None else last_tap
    own, fake, stage2 = student_parameters(config, H), teacher["total"], kind != "stage1"
    student = own["total"]
    passing = wide * max(20, 6 + 4 * k["ffn_dim"] / k["D"])  # what a block makes on its way, not to be kept
    if kind == "teacher":  # the weights, the state, one block
        return {"forward": {"weights, bf16": 2.0 * teacher["total"], "block at work": passing + 2 * wide}}
    if kind == "sample":
        # The head's block has its state (2 bytes a number), the fusion's input and output in float32, and the main
        # feature beside it; a network without a head has its state alone. The prompt's keys and values stay.
        beside, kept = (12 if H else 2) * wide, 2 * 2 * PROMPT * L * k["D"]
        return {"forward": {"weights, bf16": 2.0 * student, "block at work": float(passing + beside + kept)}}
    gpus = shard_over or gpus
    if lora:
        thin, gpus = lora_parameters(config, H, lora), 1
        student, fake = thin["own"] + thin["student"], thin["fake"]
    bf16, fp32, held = 2, 4, stage2 and not lora and not offload_teacher
    found = {
        # stage 1 has no other role, so that nothing of the base stays but the student's backbone
        "shared base, bf16": bool(lora) * bf16 * (teacher["total"] if stage2 else (L - H) * teacher["block"]),
        "student, weights": fp32 * student / gpus,
        "student, AdamW": 2 * fp32 * student / gpus,
        "student, EMA": (not lora and not ema_on_host) * fp32 * student / gpus,
        "fake score, weights": stage2 * fp32 * fake / gpus,
        "fake score, AdamW": stage2 * 2 * fp32 * fake / gpus,
        "discriminator, weights": stage2 * fp32 * disc,
        "discriminator, AdamW": stage2 * 2 * fp32 * disc,
        "teacher, bf16": held * bf16 * teacher["total"] / (gpus if shard_teacher else 1),
        "gradients": fp32 * (fake / gpus + disc if kind == "critic" else student / gpus),
    }
    # With full checkpointing a block keeps its input; with selective also attention's output and a number a head.
    # Fusion and output layer then keep about 13 bytes a number of a hidden state (`wide`) for each head call; without
    # checkpointing 28 and 10. What belongs to the output layer alone is gone when the blocks run backwards. The block
    # that does is whole: 4.3 GB at 1.3B, 12.4 at 14B. Compiled it is less, because AdaLN, norms and RoPE then keep
    # little.
    live = n * ((36.3 if compiled else 68.5) * k["D"] + 4 * k["ffn_dim"])
    if lora:  # what is between A and B is kept; that A's input becomes fp32 for a moment is less than what is passing
        live += n * 16 * lora
    # With frozen weights, as the teacher's, neither inputs of linear layers are kept nor what the scales of RMSNorm and
    # AdaLN multiply: 44 bytes a number, and 2 of the feed-forward, counted at 14B (`rehearse`). Compiled it was not
    # counted: as with trained weights, less the input of the last linear layer.
    live_frozen = n * ((36.3 if compiled else 44) * k["D"] + 2 * k["ffn_dim"])
    attended = 2 * (bf16 * wide + fp32 * n * k["num_attention_heads"])  # of self- and of cross-attention
    again = lambda size: {"none": 0.0, "selective": size - attended, "full": size}[checkpointing]
    work = again(live)
    fused = 38 if checkpointing == "none" else 13.3
    # With checkpointing much of the block is let go when its largest gradients come; counted at 1.3B (`rehearse`).
    found["block in passing"] = passing if checkpointing == "none" else 16 * wide

    def at(blocks: int, calls: int, gathered: float, whole_gradients: float = 0.0, at_work: float = work,
           frozen: int = 0) -> dict:  # fmt: skip
        """All terms while the graph holds so many blocks, some of them `frozen` ones, and head calls."""
        graph = {"block inputs": blocks * bf16 * wide}
        if checkpointing == "none":
            graph = {"whole blocks": (blocks - frozen) * live + frozen * live_frozen}
        graph["attention outputs"] = blocks * attended * (checkpointing == "selective")
        graph["outside blocks"] = (H > 0) * calls * fused * wide
        graph["gradients of the head, whole"] = whole_gradients
        terms = found | graph | {"gathered for use": gathered, "block and discriminator at work": at_work}
        if not accumulated:
            terms["gradients"] = max(found["gradients"] - sum(graph.values()), 0.0)
        return {name: float(value) for name, value in terms.items() if value}

    # What FSDP has gathered, and autocast's copy of the block at work. The student's head and what is outside its
    # blocks stay to the end of a micro-batch, for the critics' too. Of another net, when it runs backwards, there are
    # the block at work, the one fetched for after it, and the gradients of the one before, on their way to all ranks.
    one, cast = (gpus > 1) * fp32 * teacher["block"], bf16 * teacher["block"]
    root = (gpus > 1) * fp32 * (teacher["total"] - teacher["blocks"])
    added = own["total"] - own["teacher"]
    kept = H * one + root + (gpus > 1) * fp32 * added + cast
    if kind == "critic":
        # Both critics' losses have their graphs when the first, the fake score's, is run backwards; the discriminator's
        # branches run later.
        busy = {"at_work": work + 2 * disc_bytes}
        return {"fake score, last block": at(L, 0, kept + root + min(2, L) * one, **busy),
                "fake score, the block before": at(L - 1, 0, kept + root + min(3, L) * one, **busy)}  # fmt: skip
    calls = 1 if kind == "stage1" else N
    there = {"head's last block": at(L - H + calls * H, calls, kept + (0 if H else min(2, L) * one)),
                "backbone": at(L - H, 0, kept + min(3, L - H) * one)}  # fmt: skip
    if H and calls == 1:  # the backbone's last block is fetched, the gradients of the head's second are on their way
        there["head's first block"] = at(L - H + 1, 1, kept + (1 + (H > 1)) * one)
    if H and calls > 1:
        # Autograd sums the gradients of the N head calls before it hands them on: those of the last call wait, whole
        # and in fp32, while the calls before it run backwards. Its first block has fetched the backbone's last.
        whole = fp32 * (H * teacher["block"] + added)
        there["head, the calls before the last"] = at(L - H + (calls - 1) * H, calls - 1, kept + one, whole)
    if kind == "student" and disc:
        # First of all the discriminator and the teacher's features. The teacher is bf16: no copy is made of a block.
        fetched = min(2, L) * teacher["block"] + teacher["total"] - teacher["blocks"]
        fetched *= bf16 * (offload_teacher or (shard_teacher and gpus > 1))
        seen = last_tap + 1
        busy = {"at_work": max(again(live_frozen), disc_bytes + disc_live), "frozen": seen}
        there["features of the teacher"] = at(L - H + calls * H + seen, calls, kept - cast + fetched, **busy)
    return there


def memory(config: dict, n_tokens: int, kind: str, **how) -> dict[str, float]:
    """Bytes on each GPU at the peak of a step, by term: those of the highest of `moments`, which takes the same."""
    return max(moments(config, n_tokens, kind, **how).values(), key=lambda terms: sum(terms.values()))


def choose_checkpointing(config: dict, n_tokens: int, budget: float, kinds=("stage1", "student", "critic"), **held):
    """The fastest of CHECKPOINTING with which every step of `kinds` fits `budget` bytes, else "full".

    `held` goes to memory().
    """
    need = lambda mode: max(sum(memory(config, n_tokens, kind, checkpointing=mode, **held).values()) for kind in kinds)
    return next((mode for mode in CHECKPOINTING[:-1] if need(mode) <= budget), CHECKPOINTING[-1])
