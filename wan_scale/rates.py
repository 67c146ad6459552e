"""`bench`, the rates: what a GPU does in a second of each kind of work that `plan` counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wan_scale import speed
from wan_scale.cost.sizes import discriminator
from wan_scale.model import WanDiscriminator
from wan_scale.training import train


def measure(bench) -> dict:
    """Seconds and work of each of work.UNITS but attention, at the sizes of one block; "matmul": a large one.

    bench: a bench.Bench, whose device, dtype, sizes and clock these are.
    """
    n, D, wide, heads = bench.tokens, bench.D, bench.config["ffn_dim"], bench.config["num_attention_heads"]
    make = lambda *shape, dtype=bench.dtype: torch.randn(*shape, device=bench.device, dtype=dtype)
    pairs = [(D, D)] * 6 + [(D, wide), (wide, D)]  # a block's linear layers
    seconds, work = {}, {}

    def timed(unit, amount, run):
        with torch.no_grad():
            seconds[unit], work[unit] = bench.median(run, within=3.0)["seconds"], float(amount)

    def layers(unit, dtype, gradients=False):
        of_shape = lambda shapes: {shape: make(*shape, dtype=dtype) for shape in shapes}
        x, weight = of_shape({(n, D), (n, wide)}), of_shape({*pairs})
        once = lambda a, b: x[n, a].T @ x[n, b] if gradients else x[n, a] @ weight[a, b]
        timed(unit, sum(2 * n * a * b for a, b in pairs), lambda: [once(a, b) for a, b in pairs])

    def exact(suffix, tf32):
        speed.tf32(tf32)
        layers(f"fp32 linear{suffix}", torch.float32)
        q = make(1, heads, n, D // heads, dtype=torch.float32)
        timed(f"fp32 attention{suffix}", 4 * n * n * D, lambda: F.scaled_dot_product_attention(q, q, q))

    size = 8192 if bench.cuda else 256
    a, b = make(size, size), make(size, size)
    timed("matmul", 2 * size**3, lambda: a @ b)
    layers("linear", bench.dtype)
    layers("weight gradients", bench.dtype, gradients=True)
    source, target = make(n, wide), make(n, wide)
    timed("bytes", 2 * source.nbytes, lambda: target.copy_(source))
    exact("", False)
    exact(", TF32", True)
    speed.tf32(bench.cfg.tf32)
    channels = bench.D // 4
    disc = WanDiscriminator(channels, bench.cfg.disc_width, 1).to(bench.device)
    feature = make(1, channels, *bench.shape[1:]).requires_grad_()
    amount = 3 * discriminator(bench.config, bench.shape[1:], bench.cfg.disc_width, taps=1)["flops"]

    def both_ways():
        with torch.enable_grad(), train.compute(bench.cfg, bench.device):
            disc([feature]).sum().backward()

    timed("convolution", amount, both_ways)
    return {"seconds": seconds, "work": work}
