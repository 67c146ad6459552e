"""What makes Wan fast and changes no result but by rounding.

    speed.prepare(net, attn="cudnn", compiled=True, checkpointing="selective")   # after copies, before sharding

Attention backends, activation checkpointing, compiled blocks, keys and values of a prompt computed once, and a CUDA
graph of the flow head. It is all done to the stock blocks from outside: their processors and their `forward` are
replaced, no line of them is copied.
"""

from __future__ import annotations

import math
import statistics
import time
from contextlib import nullcontext
from functools import partial
from itertools import chain

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from wan_scale.cost.sizes import tokens
from wan_scale.training import dist

# --attn: diffusers' name
BACKENDS = {"native": "native", "cudnn": "_native_cudnn", "flash": "_native_flash", "flex": "flex"}


# ---- Attention -------------------------------------------------------------------------------------------------------


class Attention:
    """The stock processor on a backend. A context that is a pair is keys and values made before.

    float32 calls, such as the finite difference of stage 1, go to `native`: cuDNN and flash take only half precision.
    """

    def __init__(self, backend: str):
        self.half, self.exact = WanAttnProcessor(), WanAttnProcessor()
        self.half._attention_backend = AttentionBackendName(BACKENDS[backend])
        self.exact._attention_backend = AttentionBackendName.NATIVE

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if isinstance(encoder_hidden_states, tuple):
            attn, encoder_hidden_states = Remembering(attn, *encoder_hidden_states), hidden_states
        else:
            attn = Seen(attn)
        half = hidden_states.dtype != torch.float32 or torch.is_autocast_enabled(hidden_states.device.type)
        call = self.half if half else self.exact
        return call(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class Seen:
    """An attention layer as the stock processor sees it. The compiler cannot look into a SimpleNamespace: a class."""

    add_k_proj, fused_projections = None, False

    def __init__(self, attn):
        self.attn, self.heads, self.to_out = attn, attn.heads, attn.to_out

    def to_q(self, x):
        return self.attn.to_q(x)

    def to_k(self, x):
        return self.attn.to_k(x)

    def to_v(self, x):
        return self.attn.to_v(x)

    def norm_q(self, q):
        # autocast's norms are float32 on a GPU, which flex does not take beside a bf16 v
        return self.attn.norm_q(q).to(q.dtype)

    def norm_k(self, k):
        return self.attn.norm_k(k).to(k.dtype)


class Remembering(Seen):
    """Cross-attention whose keys and values were made before."""

    def __init__(self, attn, k, v):
        super().__init__(attn)
        self.k, self.v = k, v

    def to_k(self, x):
        return self.k

    def to_v(self, x):
        return self.v

    def norm_k(self, k):
        return k


def keys_and_values(attn, text):
    """What cross-attention makes of the text alone."""
    attn = Seen(attn)
    return attn.norm_k(attn.to_k(text)), attn.to_v(text)


def attention_times(
    heads: int, head_dim: int, tokens: int, device, dtype=torch.bfloat16, backward=True, compiled=True
) -> dict:
    """Seconds of self-attention over `tokens` by backend, or, where it does not run, the reason in words."""
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype, requires_grad=backward) for _ in range(3)
    )
    found, gradient = {}, torch.randn_like(q) if backward else None
    for name, backend in BACKENDS.items():
        attend = partial(dispatch_attention_fn, backend=AttentionBackendName(backend))
        if name == "flex" and device.type == "cuda":
            if not compiled:
                found[name] = "not in eager blocks: it would write all scores to memory"
                continue
            attend = torch.compile(attend, dynamic=False)
        try:
            found[name] = median_seconds(lambda attend=attend: attended(attend, q, k, v, gradient), device)[0]
        except Exception as e:  # whatever a backend raises on a GPU that it does not know, the others are there
            found[name] = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:100]}"
    return found


def attended(attend, q, k, v, gradient) -> None:
    """Attention, and where a gradient of its output is given, the gradients of its inputs."""
    with torch.set_grad_enabled(gradient is not None):
        output = attend(q, k, v)
        if gradient is not None:
            torch.autograd.grad(output, (q, k, v), gradient)


def moment(device):
    """This moment of the device, which has done all that it was given."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    return event


def between(start, end) -> float:
    """Seconds between two moments."""
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1000


def median_seconds(work, device, repeats: int = 3, warm: int = 2, within: float = math.inf) -> tuple[float, int]:
    """Median seconds of work() after `warm` untimed calls, and of how many calls it is.

    At most `repeats`, at least three, and more than three only while all take less than `within` seconds.
    """
    for _ in range(warm):
        work()
    seconds, begun = [], moment(device)
    while len(seconds) < repeats and (len(seconds) < 3 or between(begun, moment(device)) < within):
        start = moment(device)
        work()
        seconds.append(between(start, moment(device)))
    return statistics.median(seconds), len(seconds)


def fastest(times: dict) -> str:
    """The backend with the least seconds; RuntimeError if none ran."""
    ran = {name: seconds for name, seconds in times.items() if not isinstance(seconds, str)}
    if not ran:
        reasons = "; ".join(f"{name}: {why}" for name, why in times.items())
        raise RuntimeError(f"no attention backend runs here ({reasons}).")
    return min(ran, key=ran.get)


def tf32(allowed: bool) -> None:
    """TF32's 10 bits of mantissa in float32 matmuls AND convolutions, such as the patch embedding; else all 23.

    The finite difference of stage 1 divides by a step of 0.005, and the rounding with it.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed  # torch's default is True, whatever the matmuls' precision is


# ---- Activation checkpointing ----------------------------------------------------------------------------------------


def keep_attention(ctx, op, *args, **kw):
    """Policy of "selective": attention's output is kept, the backward pass runs the rest of the block once more."""
    return CheckpointPolicy.MUST_SAVE if "attention" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(call, mode: str, *args):
    """call(*args) under activation checkpointing: "none", "selective" (attention's output is kept) or "full".

    AUTOCAST'S CACHE OF CASTS MUST BE OFF (train.compute): a cast that the forward pass found there would be one too
    many in the backward pass.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return call(*args)
    more = {"context_fn": partial(create_selective_checkpoint_contexts, keep_attention)} if mode == "selective" else {}
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, **more)  # blocks draw nothing


# ---- Compilation -----------------------------------------------------------------------------------------------------


def forward(stock, mode: str, block, *args):
    """stock(block, *args), the class's own forward; the block is an argument, so that one compilation serves all."""
    return checkpointed(stock, mode, block, *args)


def compile_blocks(blocks, mode: str) -> None:
    """Compile every block's forward, with its checkpointing, into one function that all blocks and networks share.

    It is compiled within the hooks of FSDP, and after copies are made. AdaLN, norms, RoPE and gates fuse into few
    passes over the hidden states.
    """
    # with and without gradient, autocast, adapters; past the limit blocks run eagerly in silence
    torch._dynamo.config.recompile_limit = 64
    global compiled_forward
    compiled_forward = compiled_forward or torch.compile(forward, dynamic=False)
    for block in blocks:
        # under --lora the block inside: which adapters work is set outside of it, and a graph remembers its own
        block = getattr(block, "block", block)
        block.forward = partial(compiled_forward, type(block).forward, mode, block)


compiled_forward = None


# ---- To a whole network ----------------------------------------------------------------------------------------------


def prepare(of, attn: str = "native", compiled: bool = False, checkpointing: str | None = None, frozen: bool = False):
    """Make a WanNetwork, or a student's, fast; returns what it was given.

    frozen (sampling): its weights will not move, so a prompt's keys and values are computed once and kept.
    With activation checkpointing the output layer and a student's fusion, mostly float32, are computed again as well.
    """
    net = getattr(of, "net", of)
    net.frozen, net.checkpointing = frozen, checkpointing or net.checkpointing
    net.outside = "none" if net.checkpointing == "none" else "full"  # they have no attention to keep
    if getattr(of, "fusion", None) == "gated":
        of.fuse.forward = partial(checkpointed, type(of.fuse).forward, net.outside, of.fuse)
    # of --lora: used by the net, not owned
    under_adapters = [block.block for block in net.blocks if hasattr(block, "block")]
    stock(net.transformer, attn, under_adapters)
    if compiled:
        compile_blocks(net.blocks, net.checkpointing)
        net.checkpointing = "none"  # it happens within
    return of


def stock(transformer, attn: str = "native", more=(), compiled: bool = False):
    """Set the attention backend of the stock transformer (and of `more` modules); returns it.

    compiled: for diffusers' own pipelines, which call its blocks without activation checkpointing.
    """
    for module in chain(transformer.modules(), *(other.modules() for other in more)):
        if isinstance(module, WanAttention):
            if hasattr(module.processor, "stock"):  # Ulysses: around it
                module.processor.stock = Attention(attn)
            else:
                module.set_processor(Attention(attn))
    if compiled:
        compile_blocks(transformer.blocks, "none")
    return transformer


def chosen(cfg, config: dict, device, dtype, backward: bool) -> dict:
    """{"attn", "compiled"} as the settings say; "auto": what suits this GPU, with backends timed at the run's size.

    Prints what it chose.
    """
    compiled = cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")
    attn, words = cfg.attn, ""
    if attn == "auto" and device.type == "cpu":
        attn = "native"
    elif attn == "auto":
        n = tokens(config, cfg.frames, cfg.height, cfg.width)
        heads = config["num_attention_heads"] // cfg.context_parallel
        times = attention_times(heads, config["attention_head_dim"], n, device, dtype, backward, compiled)
        attn = fastest(times)
        told = lambda v: f": {v}" if isinstance(v, str) else f" {1000 * v:.1f} ms"
        words = ", of " + ", ".join(f"{name}{told(v)}" for name, v in times.items())
    dist.say(f"attention {attn}{words}; blocks {'compiled' if compiled else 'not compiled'}")
    return {"attn": attn, "compiled": compiled}


# ---- The flow head as a CUDA graph -----------------------------------------------------------------------------------


class GraphedHead:
    """A student for sampling whose head is a CUDA graph, replayed N times a transition. On a CPU: the student itself.

    The first head(y_s, s, r, m) of a shape is recorded. Later calls copy their inputs over those of the recording.
    THE WEIGHTS MUST STAY WHERE THEY ARE.
    """

    def __init__(self, student):
        self.student, self.features, self.recorded = student, student.features, {}

    def head(self, y_s, s, r, m):
        h, (text, *more) = m
        if isinstance(text, list):  # keys and values of all blocks: the head reads, and a replay copies, its own
            m = h, (text[-self.student.H :], *more)
        inputs, shape = torch.utils._pytree.tree_flatten((y_s, s, r, m))
        given = [v for v in inputs if isinstance(v, torch.Tensor)]
        if not self.records(y_s) or torch.is_grad_enabled():
            return self.student.head(y_s, s, r, m)
        key = tuple((v.shape, v.dtype) for v in given)
        if key not in self.recorded:
            self.recorded.clear()  # one shape at a time: a graph holds its activations
            try:
                with torch.cuda.device(y_s.device) if y_s.is_cuda else nullcontext():
                    self.recorded[key] = self.record(inputs, shape)
            except RuntimeError as e:  # the samples are the same without
                print(f"the flow head runs without a CUDA graph: {str(e).splitlines()[0]}", flush=True)
                self.records = lambda y_s: False
                return self.student.head(y_s, s, r, m)
        graph, places, output = self.recorded[key]
        for place, value in zip(places, given):
            place.copy_(value)
        graph.replay()
        return output.clone()

    @staticmethod
    def records(y_s) -> bool:
        return y_s.is_cuda

    def record(self, inputs, shape):
        """(graph, the tensors it reads, the one it writes).

        NO CACHE OF CASTS: a cast of the warm-up would not be part of the graph.
        """
        fixed = [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]
        work = lambda: self.student.head(*torch.utils._pytree.tree_unflatten(fixed, shape))
        cached, side, graph = torch.is_autocast_cache_enabled(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.set_autocast_cache_enabled(False)
        here = torch.cuda.current_stream()
        try:
            with torch.cuda.stream(here):  # and back to it, also from a recording that fails
                side.wait_stream(here)
                with torch.cuda.stream(side):  # as PyTorch asks: warmed up on another stream
                    for _ in range(3):
                        work()
                here.wait_stream(side)
                with torch.cuda.graph(graph):
                    output = work()
        finally:
            torch.set_autocast_cache_enabled(cached)
        return graph, [v for v in fixed if isinstance(v, torch.Tensor)], output
