"""Context parallelism over heads (Ulysses): one clip cut over K cards, so that each holds 1/K of every hidden state.

Rank = d K + k: the K ranks of a data rank d hold the same clip, text, times and draws whole and call the same functions of tmd_minimal.
Only between WanNetwork's embedding and its output or taps is a rank alone with its n / K tokens (k n / K and on); self-attention, which
needs all n, trades tokens for heads and back.

    split     (B, n, D) whole -> (B, n/K, D) own tokens         backward: all ranks' gradients joined, over K
    exchange  (B, n/K, D) -> (B, n, D/K) own heads, and back    backward: the other way
    gather    (B, n/K, D) -> (B, n, D) whole                    backward: K times the own slice

Why the gradients are right. Each rank differentiates its own copy of the loss L. What is whole is whole in the gradient, too: every rank
of a group has the same dL/dx. Local tokens carry K dL/dh: gather puts the K in, exchange only moves numbers, split takes it out. A weight
used on local tokens (also a time or text embedding, which meets them) thus gets K times these tokens' share of dL/dw on each rank, and the
MEAN over the group is the sum of the shares, dL/dw. A weight used on what is whole (patch embedding, discriminator) gets dL/dw on every
rank, and so in the mean. So what FSDP and dist.average_gradients do anyway, the mean over ALL ranks, is the mean over data ranks of dL/dw.
No gradient reaches t or c: on one rank theirs would be those of its tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as collective
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from wan_scale.speed import Seen
from wan_scale.training import dist


def share(net, cards: int):
    """WanNetwork `net`, each clip from now on cut over `cards` ranks; ValueError unless they divide heads and ranks."""
    heads = net.transformer.config.num_attention_heads
    if heads % cards:
        raise ValueError(f"context_parallel {cards} does not divide the {heads} heads of this transformer; take a divisor of {heads}.")
    dist.context_group(cards)  # every rank must make its groups, and here they all are
    net.cards = cards
    for block in net.blocks if cards > 1 else ():
        block.attn1.set_processor(UlyssesProcessor(cards, block.attn1.processor))  # cross-attention: every token for itself, as it is
    return net


class UlyssesProcessor:
    """The stock self-attention of local tokens (B, n/K, D): all tokens and 1/K of the heads from the norms of q and k to the output."""

    def __init__(self, cards: int, stock: WanAttnProcessor):
        self.cards, self.stock = cards, stock

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return self.stock(Shared(attn, self.cards), hidden_states, None, attention_mask, rotary_emb)


class Shared(Seen):
    """Self-attention of local tokens, its heads and all tokens traded after the norms (which go over all heads) and before rope."""

    def __init__(self, attn, cards: int):
        super().__init__(attn)
        self.cards, self.heads, self.to_out = cards, attn.heads // cards, (self.joined_out, attn.to_out[1])

    def to_v(self, x):
        return exchange(super().to_v(x), 2, 1, self.cards)

    def norm_q(self, q):
        return exchange(super().norm_q(q), 2, 1, self.cards)

    def norm_k(self, k):
        return exchange(super().norm_k(k), 2, 1, self.cards)

    def joined_out(self, h):
        return self.attn.to_out[0](exchange(h, 1, 2, self.cards))


def split(x, cards: int):
    """This rank's tokens (B, n/K, D) of x (B, n, D), which every rank of the group holds; ValueError if they do not divide."""
    if x.shape[1] % cards:
        raise ValueError(f"a clip of {x.shape[1]} tokens cannot be cut over {cards} cards; take another size, or another context_parallel.")
    return Split.apply(x, cards) if cards > 1 else x


def gather(h, cards: int):
    """All tokens (B, n, D) on every rank of the group, of local ones (B, n/K, D)."""
    return Gather.apply(h, cards) if cards > 1 else h


@torch.library.custom_op("tmd::exchange", mutates_args=())  # one operation, so that a compiled block does not look inside
def exchange(x: torch.Tensor, cut: int, join: int, cards: int) -> torch.Tensor:
    """Tokens (B, n/K, D) for heads (B, n, D/K) with cut 2, join 1; the way back with cut 1, join 2.

    Piece j of axis `cut` goes to rank j of the group; what comes from the ranks is joined along axis `join`.
    """
    pieces = x.unflatten(cut, (cards, -1)).movedim(cut, 0).contiguous()
    received = torch.empty_like(pieces)
    collective.all_to_all_single(received, pieces, group=dist.context_group(cards))
    return received.movedim(0, join).flatten(join, join + 1).contiguous()


@exchange.register_fake
def _(x, cut, join, cards):
    shape = list(x.shape)
    shape[cut], shape[join] = shape[cut] // cards, shape[join] * cards
    return x.new_empty(shape)


def remember(ctx, inputs, output):
    ctx.axes = inputs[1:]


def back(ctx, gradient):
    cut, join, cards = ctx.axes
    return exchange(gradient, join, cut, cards), None, None, None


exchange.register_autograd(back, setup_context=remember)


def own(x, cards: int):
    return x.chunk(cards, 1)[dist.rank() % cards].contiguous()


def joined(h, cards: int):
    h = h.contiguous()
    parts = [torch.empty_like(h) for _ in range(cards)]
    collective.all_gather(parts, h, group=dist.context_group(cards))
    return torch.cat(parts, 1)


class Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cards):
        ctx.cards = cards
        return own(x, cards)

    @staticmethod
    def backward(ctx, gradient):
        return joined(gradient, ctx.cards) / ctx.cards, None


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, cards):
        ctx.cards = cards
        return joined(h, cards)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.cards * own(gradient, ctx.cards), None
