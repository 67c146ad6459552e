"""Networks that only the claims try: with more or fewer blocks, and a head that corrects the backbone's velocity."""

from __future__ import annotations

import copy

from torch import nn

import tmd_minimal as tmd


def deepened(net, more: int):
    """A copy of `net` with `more` blocks at its end: copies of the last whose outputs are zero: they change nothing."""
    net = copy.deepcopy(net)
    for _ in range(more):
        block = copy.deepcopy(net.blocks[-1])
        for name, layer in block.named_modules():
            if name in ("mlp.2", "attn.out", "cross.out"):  # what a block adds to its input
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        net.blocks.append(block)
    return net


def thinned(net, keep: int):
    """A copy of `net` with `keep` of its blocks, evenly spaced, first and last among them. It has to learn anew."""
    net, last = copy.deepcopy(net), len(net.blocks) - 1
    net.blocks = nn.ModuleList(net.blocks[round(i * last / (keep - 1))] for i in range(keep))
    return net


class CorrectingStudent(nn.Module):
    """A student whose head corrects the backbone's own velocity: y_hat = v(x_t, t) + head(y_s, s, r, m).

    The backbone keeps all L blocks and its output layer. The head is a copy of the last H whose output starts at zero,
    so at first every N is one step of the teacher. Effective NFE: M (1 + N H / L), a head more than Eq. (16)'s.
    """

    def __init__(self, net: tmd.Network, H: int, fusion: str = "gated", gate_init: float = -3.0):
        super().__init__()
        self.net, self.H, self.part = copy.deepcopy(net), H, tmd.TMDStudent(net, H, fusion, gate_init)
        self.part.net.blocks = self.part.net.blocks[-H:]  # the head alone; the backbone is `net`
        nn.init.zeros_(self.part.net.proj.weight)
        nn.init.zeros_(self.part.net.proj.bias)

    @property
    def gate(self):
        return self.part.gate

    def features(self, x_t, t, c=None):
        """The main feature after L - H blocks, with its context, and the backbone's velocity (B, *D)."""
        ctx = self.net.context(c, x_t)
        e = self.net.modulate(self.net.time(t), ctx)
        h = self.net.run(self.net.embed(x_t), e, stop=-self.H)
        return (h, ctx), self.net.output(self.net.run(h, e, start=-self.H), e)

    def head(self, y_s, s, r, m):
        feature, velocity = m
        return velocity + self.part.head(y_s, s, r, feature)
