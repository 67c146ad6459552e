"""Context parallelism over heads (Ulysses): one clip split over K ranks, each with 1/K of every hidden state.

Rank = d K + k: the K ranks of a data rank d hold the same clip, text, times and draws whole and call the same functions
of tmd_minimal. Only between WanNetwork's embedding and its output or taps has rank k just its own n / K tokens, from
token k n / K on. Self-attention needs all n: there the ranks trade tokens for heads and back.

    split     (B, n, D) whole -> (B, n/K, D) own tokens         backward: all ranks' gradients joined, over K
    exchange  (B, n/K, D) -> (B, n, D/K) own heads, and back    backward: the other way
    gather    (B, n/K, D) -> (B, n, D) whole                    backward: K times the own slice

Why the gradients are right. Each rank differentiates its own copy of the loss L. What is whole is whole in the
gradient, too: every rank of a group has the same dL/dx. Local tokens carry K dL/dh: gather puts the K in, exchange only
moves numbers, split takes it out. A weight used on local tokens (also a time or text embedding, which meets them) thus
gets K times these tokens' share of dL/dw on each rank, and the MEAN over the group is the sum of the shares, dL/dw. A
weight used on what is whole (patch embedding, discriminator) gets dL/dw on every rank, and so in the mean. So what FSDP
and dist.average_gradients do anyway, the mean over ALL ranks, is the mean over data ranks of dL/dw. No gradient reaches
t or c: on one rank theirs would be those of its tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as collective
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from wan_scale.speed import Seen
from wan_scale.training import dist


def share(net, K: int):
    """Split each clip of the WanNetwork `net` over K ranks from now on; ValueError unless K divides heads and ranks."""
    heads = net.transformer.config.num_attention_heads
    if heads % K:
        uneven = f"context_parallel {K} does not divide the {heads} heads of this transformer"
        raise ValueError(f"{uneven}; take a divisor of {heads}.")
    dist.context_group(K)  # every rank must make its groups, and here they all are
    net.ranks = K
    for block in net.blocks if K > 1 else ():  # attn2, cross-attention, is every token for itself: as it is
        block.attn1.set_processor(UlyssesProcessor(K, block.attn1.processor))
    return net


class UlyssesProcessor:
    """The stock self-attention of local tokens (B, n/K, D).

    From the norms of q and k to the output it sees all tokens and 1/K of the heads.
    """

    def __init__(self, K: int, stock: WanAttnProcessor):
        self.K, self.stock = K, stock

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return self.stock(Shared(attn, self.K), hidden_states, None, attention_mask, rotary_emb)


class Shared(Seen):
    """An attention layer that trades local tokens for own heads, after the norms (over all heads) and before rope."""

    def __init__(self, attn, K: int):
        super().__init__(attn)
        self.K, self.heads, self.to_out = K, attn.heads // K, (self.joined_out, attn.to_out[1])

    def to_v(self, x):
        return exchange(super().to_v(x), 2, 1, self.K)

    def norm_q(self, q):
        return exchange(super().norm_q(q), 2, 1, self.K)

    def norm_k(self, k):
        return exchange(super().norm_k(k), 2, 1, self.K)

    def joined_out(self, h):
        return self.attn.to_out[0](exchange(h, 1, 2, self.K))


def split(x, K: int):
    """This rank's tokens (B, n/K, D) of x (B, n, D), which every rank holds; ValueError if they do not divide."""
    if x.shape[1] % K:
        uneven = f"a clip of {x.shape[1]} tokens cannot be split over {K} ranks"
        raise ValueError(f"{uneven}; take another size, or another context_parallel.")
    return Split.apply(x, K) if K > 1 else x


def gather(h, K: int):
    """All tokens (B, n, D) on every rank of the group, of local ones (B, n/K, D)."""
    return Gather.apply(h, K) if K > 1 else h


# one operation, so that a compiled block does not look inside
@torch.library.custom_op("tmd::exchange", mutates_args=())
def exchange(x: torch.Tensor, cut: int, join: int, K: int) -> torch.Tensor:
    """Tokens (B, n/K, D) for heads (B, n, D/K) with cut 2, join 1; the way back with cut 1, join 2.

    Piece j of axis `cut` goes to rank j of the group; what comes from the ranks is joined along axis `join`.
    """
    pieces = x.unflatten(cut, (K, -1)).movedim(cut, 0).contiguous()
    received = torch.empty_like(pieces)
    collective.all_to_all_single(received, pieces, group=dist.context_group(K))
    return received.movedim(0, join).flatten(join, join + 1).contiguous()


@exchange.register_fake
def _(x, cut, join, K):
    shape = list(x.shape)
    shape[cut], shape[join] = shape[cut] // K, shape[join] * K
    return x.new_empty(shape)


def remember(ctx, inputs, output):
    ctx.axes = inputs[1:]


def back(ctx, gradient):
    cut, join, K = ctx.axes
    return exchange(gradient, join, cut, K), None, None, None


exchange.register_autograd(back, setup_context=remember)


def own(x, K: int):
    return x.chunk(K, 1)[dist.rank() % K].contiguous()


def joined(h, K: int):
    h = h.contiguous()
    parts = [torch.empty_like(h) for _ in range(K)]
    collective.all_gather(parts, h, group=dist.context_group(K))
    return torch.cat(parts, 1)


class Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, K):
        ctx.K = K
        return own(x, K)

    @staticmethod
    def backward(ctx, gradient):
        return joined(gradient, ctx.K) / ctx.K, None


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, K):
        ctx.K = K
        return joined(h, K)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.K * own(gradient, ctx.K), None
