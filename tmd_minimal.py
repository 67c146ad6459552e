"""Transition Matching Distillation (TMD, arXiv:2601.09881): the whole method in one file.

TMD turns a many-step diffusion model into a generator of one or two steps. It cuts the teacher network in two: a main
backbone (the first L-H blocks), run once for each of M outer transitions, and a small recurrent flow head (the last H
blocks), run N times inside each transition. Stage 1 (TM-MF) pretrains the head as a conditional flow map. Stage 2
(DMD2-v) distils the teacher's distribution into the whole student while the head is rolled out.

    python toy_2d.py               # the method on points in the plane: teacher, stage 1, stage 2, baseline, pictures
    python toy_video.py            # and on tiny videos with prompts: the same functions
    python wan_scale/run.py        # and on Wan2.1: the same functions again
    make test                      # the closed forms that this file is checked against

Notation (the paper's; TIME 1 IS NOISE, TIME 0 IS DATA, in the outer and in the inner flow)
    x, x_1, x_t     data, outer noise, x_t = (1-t) x + t x_1               outer grid 0 = t_0 < ... < t_M = 0.999
    y, y_1, y_s     target x_1 - x (or x), noise, y_s = (1-s) y + s y_1    inner grid 0 = s_0 < ... < s_N = 0.999
    m               main feature, what the backbone hands to the head; opaque to everything but the student
    u, v            average velocity of the inner flow over [r, s], r <= s; velocity
    c, c_neg        condition and negative (empty) condition
Shapes: states are (B, *D) of any rank, times are (B,) in [0, 1], grids are (M+1,) and (N+1,) and increase.
The contract between algorithm and network, all of it:
    student.features(x_t, t, c) -> m                 student.head(y_s, s, r, m) -> prediction of y, shaped like y_s
    teacher(x_t, t, c) -> velocity                   teacher.taps(x_t, t, c, blocks) -> list of features
Where to find the paper
    Eq. 1, 5  interpolate       Eq. 8-10  tm_mf_loss         Eq. 14  inner_velocity    Alg. 1  sample
    Eq. 2     denoising_loss    Eq. 11    vsd_loss           Eq. 15  clean_estimate    Alg. 2  stage1_draw, tm_mf_loss
    Eq. 4, 18 outer_step        Eq. 13    inner_flow         Eq. 16  effective_nfe     Sec. 3.1  TMDStudent
    Eq. 6     tm_mf_loss (r=s)  Eq. 17    velocity_to_clean  Eq. 19  outer_step        Sec. 3.2  stage2_*_loss
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

T_MIN, T_MAX = 0.001, 0.999  # every sampled time lies in here; t_M = s_N = T_MAX

# ---- Config: one dataclass a stage. Defaults are the paper's; a rung passes only what differs. -----------------------


def choose(name: str, value, known) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, known))}.")


@dataclass
class StudentConfig:
    """The split, the two grids, and the readings of the equations that the paper leaves open or prints wrong."""

    M: int = 2  # outer transitions; paper: 1, 2
    N: int = 2  # inner steps of the flow head; paper: 2, 4
    H: int = 5  # blocks in the flow head; paper: 5
    fusion: str = "gated"  # how y_s meets m: gated | concat
    gate_init: float = -3.0  # choice: sigmoid(-3) = 0.05 of y_s at the start, so the student starts near the teacher
    target: str = "x1-x"  # inner target y: "x1-x" | "x"
    field: str = "consistent"  # choice: Eq. 14 "consistent" u = (y_s - head)/s | "printed" u = y_1 - head
    clean: str = "consistent"  # choice: Eq. 15 "consistent" x_t - t y | "printed" x_1 - y (training only)
    outer: str = "deterministic"  # outer transition: "deterministic" (Eq. 18) | "renoised" (Eq. 19)
    outer_shift: float = 10.0  # timestep shift of the outer grid; paper: 10
    inner_shift: float = 10.0  # timestep shift of the inner grid; paper: 10

    def __post_init__(self):
        known = {"fusion": ("gated", "concat"), "target": ("x1-x", "x"), "outer": ("deterministic", "renoised")}
        for name, values in (known | dict.fromkeys(("field", "clean"), ("consistent", "printed"))).items():
            choose(name, getattr(self, name), values)
        self.outer_grid = make_grid(self.M, self.outer_shift, "M")
        self.inner_grid = make_grid(self.N, self.inner_shift, "N")


@dataclass
class Stage1Config:
    """TM-MF pretraining (Algorithm 2)."""

    updates: int = 3000  # paper: 3k
    batch: int = 64  # paper: 64
    lr: float = 3e-5  # paper: 3e-5 (1.3B), 1e-5 (14B)
    guidance: float = 3.0  # w of v_cfg = w v + (1-w) u(c_neg); 1 switches guidance off; paper: 3
    cond_drop: float = 0.1  # share of conditions replaced by c_neg; paper: 0.1
    flow_map_share: float = 0.25  # share of the batch with r < s; 0 is plain transition matching (TM); paper: 0.25
    s_shift: float = 3.0  # shift of the distribution of s; paper: 3
    derivative: str = "fd"  # du/ds by "fd" (central differences) | "jvp" (exact forward mode); paper: fd
    fd_step: float = 0.005  # paper: 0.005
    adaptive_c: float = 1.0  # c / d in the adaptive weight; paper: 1 (1.3B), 1e-5 (14B, Table 7)
    ema: float = 0.999  # choice: decay of the EMA that is sampled from

    def __post_init__(self):
        choose("derivative", self.derivative, ("fd", "jvp"))


@dataclass
class Stage2Config:
    """DMD2-v with flow-head rollout; with PlainStudent, DMD2-v itself."""

    iterations: int = 4000  # paper: 4k (M >= 2), 12k (M = 1); 1k, 5k at 14B
    batch: int = 64  # paper: 64
    lr: float = 1e-5  # student, fake score, discriminator; paper: 1e-5
    student_every: int = 5  # one student update in so many iterations, the others train fake score and discriminator
    dmd_shift: float = 5.0  # shift of the distribution of t in VSD, fake score and GAN; paper: 5
    guidance: float = 5.0  # teacher's guidance in VSD; paper: 5
    gan_weight: float = 0.03  # lambda; 0 switches the GAN off; paper: 0.03
    normalizer: str = "dmd"  # choice: VSD gradient over mean|x_hat - g_teacher| | "paper" mean|g_fake - g_teacher|
    rollout: str = "full"  # gradient through "full" rollout | "last" inner step only | "none": single inner jumps
    ema: float = 0.99  # choice: decay of the EMA that is sampled from

    def __post_init__(self):
        choose("normalizer", self.normalizer, ("dmd", "paper", "none"))
        choose("rollout", self.rollout, ("full", "last", "none"))
        if self.student_every < 2 or self.iterations < 1:
            raise ValueError("student_every must be at least 2 (critics train in between) and iterations at least 1.")


# ---- Time and noise --------------------------------------------------------------------------------------------------


def shift(t, gamma: float):
    """Timestep shift gamma t / ((gamma-1) t + 1): gamma > 1 moves times toward noise, 1 is the identity."""
    if gamma <= 0:
        raise ValueError(f"timestep shift is {gamma}; it must be positive (1 leaves the times as they are).")
    return gamma * t / ((gamma - 1) * t + 1)


def make_grid(steps: int, gamma: float, name: str = "steps", dtype=torch.float32) -> torch.Tensor:
    """Times shift(i / steps, gamma) with the last at 0.999: (steps+1,), increasing; the outer (M) or inner (N) grid."""
    if steps < 1:
        raise ValueError(f"{name} is {steps}; it must be at least 1.")
    grid = shift(torch.linspace(0, 1, steps + 1, dtype=torch.float64), gamma)
    if grid[-2] >= T_MAX:
        told = f"{name} = {steps} with shift {gamma:g} puts two times above {T_MAX}"
        raise ValueError(f"{told}; take fewer steps or a smaller shift.")
    grid[-1] = T_MAX
    return grid.to(dtype)  # choice: float32 times; drawn times have their grid's dtype, float64 gives the paper's


def down(grid: torch.Tensor, device=None):
    """Pairs (from, to) of neighbouring times of a grid (K+1,), from noise to data.

    RAISES ValueError unless the grid increases from 0 to at most 1.
    """
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] > 1 or not bool((grid.diff() > 0).all()):
        raise ValueError(f"a time grid must increase from 0 to at most 1; this one of {grid.numel()} times does not.")
    return pairwise(grid.flip(0).to(device))


def bcast(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Shape times (B,) so that they multiply states (B, *D)."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"times {tuple(t.shape)} do not fit a batch {tuple(x.shape)}; pass one time a sample.")
    return t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def interpolate(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1-t) x + t x_1, Eq. (1); with y, y_1, s it is Eq. (5). x, noise (B, *D), t (B,) in [0, 1] -> (B, *D)."""
    if x.shape != noise.shape:
        raise ValueError(f"data of shape {tuple(x.shape)} and noise of shape {tuple(noise.shape)} disagree.")
    if not t.is_cuda and bool(((t < 0) | (t > 1)).any()):  # on a GPU the check would wait for the device
        raise ValueError(f"times must lie in [0, 1], got {t.min().item():.3g} to {t.max().item():.3g}; 1 is noise.")
    x, noise, t = at_least_fp32(x), at_least_fp32(noise), bcast(t, at_least_fp32(x))
    return (1 - t) * x + t * noise  # Eq. (1), Eq. (5)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """x in float32 if it is in half precision, where 0.999 is 1. Networks may run in half, states and losses never."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def randn_like(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Gaussian noise shaped like x from `generator`."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def sample_times(x: torch.Tensor, gamma: float, generator: torch.Generator | None, dtype=torch.float32) -> torch.Tensor:
    """t ~ shift(U(0, 1), gamma) clamped to [0.001, 0.999], one a sample of x: (B,)."""
    return shift(torch.rand(len(x), generator=generator, device=x.device).to(dtype), gamma).clamp(T_MIN, T_MAX)


def sample_outer(x: torch.Tensor, outer_grid: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """t_i uniform over {t_1, ..., t_M}: (B,)."""
    return outer_grid.to(x.device)[torch.randint(1, len(outer_grid), (len(x),), generator=generator, device=x.device)]


def sample_s_r(x, inner_grid, s_shift: float, flow_map_share: float, generator, coin=None):
    """s ~ shift(U, s_shift); r = s_k, k = max{j : s_j <= s}, for `flow_map_share`; else r = s. Two (B,).

    coin: a generator for that choice alone, which batches can share; without it, `generator`.
    """
    s = sample_times(x, s_shift, generator, inner_grid.dtype)
    grid = inner_grid.to(x.device)
    below = grid[torch.searchsorted(grid, s, right=True) - 1]
    flips = torch.rand(len(x), generator=coin or generator, device=x.device)  # choice: a coin per sample
    is_map = flips < flow_map_share
    return s, torch.where(is_map, below, s)


def effective_nfe(M: int, N: int, H: int, L: int) -> float:
    """M (1 + (N-1) H / L), Eq. (16): network evaluations per sample, counted in whole networks."""
    return M * (1 + (N - 1) * H / L)


# ---- Networks: Wan's layout, small -----------------------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """Times (B,) -> (B, width): sinusoids, then a two-layer MLP. `max_freq` bounds d/dt, which stage 1 sees."""

    def __init__(self, width: int, max_freq: float):
        super().__init__()
        self.register_buffer("freqs", torch.logspace(0, math.log10(max_freq), width // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(width // 2 * 2, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angles = t[:, None] * self.freqs  # in the dtype of t: pass float64 where the frequencies are high
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class AdaMLP(nn.Module):
    """Residual MLP under adaptive norm: h + gate * MLP((1 + scale) norm(h) + shift).

    The three come from a learnt table plus e[0] (B, 3, W).
    """

    def __init__(self, width: int, expand: int = 2):  # choice: the fusion MLP expands twofold, as the toys' blocks do
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, width) / width**0.5)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, expand * width), nn.GELU("tanh"), nn.Linear(expand * width, width))

    def forward(self, h, e):  # h (B, ..., W), e[0] (B, 3, W)
        shift_, scale, gate = (e[0][:, -3:] + self.table).reshape(len(h), 3, *[1] * (h.ndim - 2), h.shape[-1]).unbind(1)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift_)


class Network(nn.Module):
    """What the rungs' networks share. A rung's network has `time`, `patch`, `blocks` and writes

    embed(x) -> h; context(c, x) -> ctx, once a sample; modulate(time embedding, ctx) -> e; output(h, e) -> velocity.
    Hidden states h are (B, ..., width), blocks are called as block(h, e).
    """

    def run(self, h, e, start: int = 0, stop: int | None = None):
        """Blocks start to stop."""
        for block in self.blocks[start:stop]:
            h = block(h, e)
        return h

    def forward(self, x_t, t, c=None):
        """Velocity E[x_1 - x | x_t], Eq. (2). x_t (B, *D), t (B,), c or None -> (B, *D)."""
        e = self.modulate(self.time(t), self.context(c, x_t))
        return self.output(self.run(self.embed(x_t), e), e)

    def taps(self, x_t, t, c, blocks) -> list[torch.Tensor]:
        """Hidden states after the given blocks (0-based, increasing), stopping at the last of them."""
        if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] >= len(self.blocks):
            last = len(self.blocks) - 1
            raise ValueError(f"feature blocks {list(blocks)} do not fit; give increasing ones of blocks 0 to {last}.")
        e, found = self.modulate(self.time(t), self.context(c, x_t)), [self.embed(x_t)]
        for before, i in zip((-1, *blocks), blocks):
            found.append(self.run(found[-1], e, before + 1, i + 1))
        return found[1:]


class TMDStudent(nn.Module):
    """A teacher cut in two (Section 3, A.1): backbone = first L-H blocks, flow head = last H blocks and output layer.

    Starts as the teacher does at s = t while the gate is closed. RAISES ValueError unless 1 <= H < L.
    """

    def __init__(self, net: Network, H: int, fusion: str = "gated", gate_init: float = -3.0):
        super().__init__()
        L, width = len(net.blocks), net.patch.weight.shape[0]
        if not 1 <= H < L:
            raise ValueError(f"the flow head has H = {H} blocks of a network of L = {L}; choose 1 <= H < L.")
        choose("fusion", fusion, ("gated", "concat"))
        self.net, self.H, self.fusion = copy.deepcopy(net), H, fusion
        self.span = copy.deepcopy(net.time)  # embeds s - r
        for p in self.span.mlp[-1].parameters():  # only the LAST layer: zeroing all would kill the gradient for good
            nn.init.zeros_(p)
        if fusion == "gated":
            self.fuse = AdaMLP(width)
            self.gate = nn.Parameter(torch.full((width,), gate_init))  # choice: one gate a channel
        else:
            self.fuse = nn.Linear(2 * width, width, bias=False)  # B.3: identity on m, N(0, 0.01^2) on y_s
            nn.init.normal_(self.fuse.weight, std=0.01)
            self.fuse.weight.data[:, :width] = torch.eye(width)

    def features(self, x_t, t, c=None):
        """Main feature m = m_theta(x_t, t, c), evaluated once per outer transition."""
        ctx = self.net.context(c, x_t)
        return self.net.run(self.net.embed(x_t), self.net.modulate(self.net.time(t), ctx), stop=-self.H), ctx

    def head(self, y_s, s, r, m):
        """Prediction of y from y_s at time s for the step to r <= s, given m. y_s (B, *D), s, r (B,) -> (B, *D)."""
        h, ctx = m
        temb = self.net.time(s)
        z = self.net.embed(y_s)  # the teacher's own patch embedding, shared with x_t
        if self.fusion == "gated":
            z = self.fuse(z, self.net.modulate(temb, ctx))  # choice: a class, if any, enters with the embedding of s
            h = torch.lerp(h.to(z.dtype), z, self.gate.sigmoid())
        else:
            h = self.fuse(torch.cat([h.to(z.dtype), z], -1))
        e = self.net.modulate(temb + self.span(s - r), ctx)
        return self.net.output(self.net.run(h, e, start=-self.H), e)


class PlainStudent(nn.Module):
    """DMD2-v's student in TMD's contract: the whole network is the backbone and the head hands its velocity on.

    With N = 1 and the consistent readings every function below becomes DMD2-v's, g(x_t, t) = x_t - t v(x_t, t).
    """

    H = 0

    def __init__(self, net: Network):
        super().__init__()
        self.net = copy.deepcopy(net)

    def features(self, x_t, t, c=None):
        return self.net(x_t, t, c)

    def head(self, y_s, s, r, m):
        return m


# ---- Transition matching: one outer transition, its inner flow, and the samplers -------------------------------------


def transition(student, x_t, t, c=None, target: str = "x1-x"):
    """Run the backbone once; return predict(y_s, s, r) -> estimate of y (B, *D), which runs the head alone."""
    m = student.features(x_t, t, c)

    def predict(y_s, s, r):
        prediction = student.head(y_s, s, r, m)
        # choice: for y = x the head still speaks the teacher's language (velocity), so it still starts as the teacher
        return prediction if target == "x1-x" else velocity_to_clean(x_t, t, prediction)

    return predict


def inner_velocity(prediction, y_s, s, y_1, field: str = "consistent"):
    """Inner velocity u from the head's estimate of y, Eq. (14).

    "printed" u = y_1 - head: right on training pairs only; sampling needs E[y_1 | y_s], not the trajectory's own y_1.
    "consistent" u = (y_s - head) / s: the same on training pairs, as y_1 - y = (y_s - y) / s, and a velocity field.
    """
    if field == "printed":
        return y_1 - prediction
    return (y_s - prediction) / bcast(s, y_s)


def inner_flow(predict, y_1, inner_grid, field: str = "consistent", grad: str = "full", trace: list | None = None):
    """Roll the head from y_1 to y_hat in N steps y_r = y_s - (s-r) u: Alg. 1's inner loop, Eq. (13), sign mended.

    predict(y_s, s, r) -> (B, *D), y_1 (B, *D), inner_grid (N+1,) -> y_hat (B, *D). grad="last": GRADIENT STOPS at every
    step but the last. `trace` collects y_s of every step.
    """
    y_s = y_1
    for s, r in down(inner_grid, y_1.device):
        with torch.set_grad_enabled(torch.is_grad_enabled() and (grad == "full" or bool(r == 0))):
            if trace is not None:
                trace.append(y_s)
            s_b, r_b = s.expand(len(y_1)), r.expand(len(y_1))
            u = inner_velocity(predict(y_s, s_b, r_b), y_s, s_b, y_1, field)
            y_s = y_s - (s - r).to(y_s.dtype) * u  # Eq. (13): toward data is minus
    if trace is not None:
        trace.append(y_s)
    return y_s


def velocity_to_clean(x_t, t, v):
    """g = x_t - t v, Eq. (17): the clean sample that a velocity points at."""
    return x_t - bcast(t, x_t) * v


def clean_estimate(y_hat, x_t, t, target: str = "x1-x", clean: str = "consistent", x_1=None):
    """x_hat from the inner flow's y_hat, Eq. (15).

    "printed" x_1 - y_hat leaks the training noise: given x_t, x_1 = (x_t - (1-t) x) / t still depends on the real x.
    "consistent" x_t - t y_hat is what Algorithm 1 ends in. For target "x", y_hat is x_hat.
    """
    if target == "x":
        return y_hat
    return x_1 - y_hat if clean == "printed" else velocity_to_clean(x_t, t, y_hat)


def outer_step(x_t, x_hat, t, t_next, outer: str = "deterministic", generator=None):
    """From x_t to x_{t'}, t' < t: on the line to x_hat (Eq. 4, Eq. 18), or x_hat noised anew (Eq. 19). Times (B,)."""
    if outer == "renoised":
        return interpolate(x_hat, randn_like(x_hat, generator), t_next)  # Eq. (19)
    return torch.lerp(x_hat, x_t, bcast(t_next / t, x_t))  # Eq. (18); with y = (x_t - x_hat) / t it is Eq. (4)


@torch.no_grad()
def sample(student, x_1, c=None, *, outer_grid, inner_grid, target="x1-x", field="consistent", outer="deterministic",
           generator=None, trace: list | None = None):  # fmt: skip
    """Algorithm 1: noise x_1 (B, *D) -> samples (B, *D) in M backbone and M N head evaluations.

    `trace` collects one dict a transition: t, x_t, x_hat and the list of y_s.
    """
    x = x_1
    for t, t_next in down(outer_grid, x.device):
        t, t_next = t.expand(len(x)), t_next.expand(len(x))
        predict = transition(student, x, t, c, target)  # backbone, once
        inner = [] if trace is not None else None
        y_hat = inner_flow(predict, randn_like(x, generator), inner_grid, field, trace=inner)  # fresh y_1, N head steps
        x_hat = clean_estimate(y_hat, x, t, target)
        if trace is not None:
            trace.append({"t": t[0].item(), "x_t": x, "x_hat": x_hat, "y": inner})
        x = outer_step(x, x_hat, t, t_next, outer, generator)
    return x


def guided(net, x_t, t, c=None, c_neg=None, w: float = 1.0):
    """Velocity under classifier-free guidance, v_neg + w (v - v_neg); w = 1 is no guidance (some code calls that 0)."""
    v = net(x_t, t, c)
    if w == 1.0 or c is None:
        return v
    return torch.lerp(net(x_t, t, expand_condition(c_neg, c)), v, w)


@torch.no_grad()
def sample_teacher(teacher, x_1, c=None, c_neg=None, *, grid, guidance: float = 1.0, method: str = "euler"):
    """Integrate dx/dt = v from t_K to 0 by Euler, or Heun (two calls a step but the last): x_1 (B, *D) -> (B, *D)."""
    choose("method", method, ("euler", "heun"))
    x = x_1
    for t, t_next in down(grid, x.device):
        t, t_next = t.expand(len(x)), t_next.expand(len(x))
        v = guided(teacher, x, t, c, c_neg, guidance)
        dt = bcast(t_next - t, x)
        if method == "heun" and bool(t_next[0] > 0):
            v = (v + guided(teacher, x + dt * v, t_next, c, c_neg, guidance)) / 2
        x = x + dt * v
    return x


def expand_condition(c_neg, c):
    """The empty condition for a whole batch: c_neg (*C) -> (B, *C), shaped like c."""
    if c_neg is None:
        raise ValueError("guidance and dropout need the empty condition c_neg; pass it, or w = 1 and no dropout.")
    return torch.as_tensor(c_neg, dtype=c.dtype, device=c.device).expand_as(c)


def drop_condition(c, c_neg, dropped):
    """Replace the conditions c (B, *C) by c_neg where `dropped` (B,) is true."""
    return torch.where(dropped.reshape(-1, *[1] * (c.ndim - 1)), expand_condition(c_neg, c), c)


# ---- Losses of the teacher, stage 1 and stage 2 ----------------------------------------------------------------------
# Plain arguments; the draws come in, so that each can be tested on fixed ones.


def denoising_loss(net, x, noise, t, c=None):
    """|| v(x_t, t) - (x_1 - x) ||^2, whose optimum is Eq. (2): trains the teacher, and on x_hat the fake score."""
    x, noise = at_least_fp32(x), at_least_fp32(noise)
    return (net(interpolate(x, noise, t), t, c) - (noise - x)).square().mean()


def total_derivative(f, y_s, s, v, method: str = "fd", step: float = 0.005):
    """d/ds f(y_s, s) of the head f along dy_s/ds = v, at fixed r and m: the backbone rests. NO GRADIENT, >= float32.

    "fd": central differences of `step`, one-sided where s +- step leaves [0.001, 0.999]. "jvp": exact, torch.func.jvp.
    """
    y_s, v = at_least_fp32(y_s), at_least_fp32(v)  # 0.005 is below what bf16 resolves: the difference would be rounding
    with torch.no_grad(), torch.autocast(y_s.device.type, enabled=False):
        if method == "jvp":
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
                return torch.func.jvp(f, (y_s, s), (v, torch.ones_like(s)))[1]
        up, low = (s + step).clamp(max=T_MAX), (s - step).clamp(min=T_MIN)
        high = f(y_s + bcast(up - s, y_s) * v, up)
        return (high - f(y_s + bcast(low - s, y_s) * v, low)) / bcast(up - low, y_s)


def adaptive_loss(error, c: float = 1.0):
    """Mean over the batch of ||e||^2 / sg(||e||^2 + c d), d = numel of a sample: bounded pull of every sample."""
    square = error.flatten(1).square()
    return (square.sum(1) / (square.sum(1) + c * square.shape[1]).detach()).mean()


def stage1_draw(x, outer_grid, inner_grid, s_shift=3.0, flow_map_share=0.25, cond_drop=0.1, generator=None,
                coin=None) -> dict:  # fmt: skip
    """All random numbers of one stage 1 update (Alg. 2): t, x_1, y_1, s, r and which conditions are dropped."""
    s, r = sample_s_r(x, inner_grid, s_shift, flow_map_share, generator, coin)
    t, x_1, y_1 = sample_outer(x, outer_grid, generator), randn_like(x, generator), randn_like(x, generator)
    dropped = torch.rand(len(x), generator=generator, device=x.device) < cond_drop
    return {"t": t, "x_1": x_1, "y_1": y_1, "s": s, "r": r, "dropped": dropped}


def tm_mf_loss(student, x, c=None, *, t, x_1, y_1, s, r, dropped=None, c_neg=None, guidance=1.0, target="x1-x",
               field="consistent", derivative="fd", fd_step=0.005, adaptive_c=1.0):  # fmt: skip
    """TM-MF, Algorithm 2: the head's average velocity u(y_s, s, r; m) obeys the MeanFlow identity u + (s-r) du/ds = v.

    ||u - sg(v - (s-r) du/ds)||^2, Eq. (8)-(10), adaptively weighted. Where r = s it is TM, flow matching of the inner
    flow (Eq. 6). x (B, *D), times (B,), draws from stage1_draw. GRADIENT FLOWS into the backbone: m is not detached.
    """
    x, x_1, y_1 = at_least_fp32(x), at_least_fp32(x_1), at_least_fp32(y_1)
    x_t = interpolate(x, x_1, t)
    y = x_1 - x if target == "x1-x" else x  # Eq. (3), or B.4
    y_s = interpolate(y, y_1, s)
    v = y_1 - y
    c_in = c if c is None or dropped is None else drop_condition(c, c_neg, dropped)
    if guidance != 1.0 and c is not None:
        with torch.no_grad():
            predict_neg = transition(student, x_t, t, expand_condition(c_neg, c), target)
            u_neg = inner_velocity(predict_neg(y_s, s, s), y_s, s, y_1, field)
            v_cfg = guidance * v + (1 - guidance) * u_neg
            v = v_cfg if dropped is None else torch.where(bcast(dropped, v).bool(), v, v_cfg)
    predict = transition(student, x_t, t, c_in, target)  # backbone, once
    u = inner_velocity(predict(y_s, s, r), y_s, s, y_1, field)  # Eq. (14)
    goal = v
    if bool((r < s).any()):  # else du/ds is multiplied by zero
        # choice: du/ds runs along the guided v, the velocity of the flow whose map is being learnt
        dh_ds = total_derivative(lambda y_s, s: predict(y_s, s, r), y_s, s, v, derivative, fd_step)
        # the 1/s of the consistent field by the quotient rule: a finite difference across it fails at s < 0.02
        du_ds = -dh_ds if field == "printed" else (v - dh_ds - u) / bcast(s, y_s)
        goal = v - bcast(s - r, y_s) * du_ds  # Eq. (10)
    error = u - goal.detach()
    # choice: measured on the head's output, so that both fields weigh s alike (the consistent u itself: by 1 / s^2)
    return adaptive_loss(error * bcast(s, y_s) if field == "consistent" else error, adaptive_c)


def generate(student, x, c=None, *, outer_grid, inner_grid, generator=None, target="x1-x", field="consistent",
             clean="consistent", rollout="full"):  # fmt: skip
    """x_hat of stage 2: real x (B, *D) noised to a random t_i, then one transition of the student to clean: (B, *D).

    "full": gradient through all N inner steps, the backbone evaluated once. Ablations: "last", gradient through the
    last step only; "none", no rollout: one jump from y_s, real y noised to a random s_j (sampling never sees that).
    """
    x = at_least_fp32(x)
    t, x_1, y_1 = sample_outer(x, outer_grid, generator), randn_like(x, generator), randn_like(x, generator)
    x_t = interpolate(x, x_1, t)
    predict = transition(student, x_t, t, c, target)
    if rollout == "none":
        s = sample_outer(x, inner_grid, generator)
        y_s = interpolate(x_1 - x if target == "x1-x" else x, y_1, s)
        y_hat = y_s - bcast(s, y_s) * inner_velocity(predict(y_s, s, torch.zeros_like(s)), y_s, s, y_1, field)
    else:
        y_hat = inner_flow(predict, y_1, inner_grid, field, grad=rollout)
    return clean_estimate(y_hat, x_t, t, target, clean, x_1)


def vsd_loss(x_hat, g_fake, g_teacher, normalizer: str = "dmd"):
    """A loss whose gradient on x_hat is (g_fake - g_teacher) / normalizer, Eq. (11): down KL(student || teacher).

    "dmd" divides by mean|x_hat - g_teacher|; "paper" by mean|g_fake - g_teacher|, which keeps full size however close
    the two are. (choice: the mean, not the sum, of absolute values, so that the step does not shrink with x's size.)
    """
    with torch.no_grad():
        difference = at_least_fp32(g_fake) - at_least_fp32(g_teacher)
        sizes = {"dmd": at_least_fp32(x_hat) - g_teacher, "paper": difference, "none": torch.ones_like(difference)}
        size = sizes[normalizer]
        gradient = difference / bcast(size.flatten(1).abs().mean(1).clamp_min(1e-12), size)
    return (x_hat * gradient).flatten(1).mean(1).mean()


def gan_loss(logits, as_real: bool):
    """-log D, or -log(1 - D), averaged over heads and batch. The generator's is gan_loss(fake, as_real=True)."""
    return F.softplus(-logits if as_real else logits).mean()


@contextmanager
def frozen(*nets):
    """Within, the parameters of `nets` take no gradient; gradient still passes through to their inputs."""
    before = [(p, p.requires_grad) for net in nets for p in net.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def stage2_student_loss(x_hat, teacher, fake_score, discriminator, c=None, c_neg=None, *, t, noise, guidance=5.0,
                        gan_weight=0.03, taps=(), normalizer="dmd") -> dict:  # fmt: skip
    """Losses of the student on x_hat (B, *D) with its graph: "vsd" and "gan". ONLY THE STUDENT TAKES GRADIENT."""
    x_hat_t = interpolate(x_hat, noise, t)
    with torch.no_grad():
        g_fake = velocity_to_clean(x_hat_t, t, fake_score(x_hat_t, t, c))  # Eq. (17)
        g_teacher = velocity_to_clean(x_hat_t, t, guided(teacher, x_hat_t, t, c, c_neg, guidance))
    terms = {"vsd": vsd_loss(x_hat, g_fake, g_teacher, normalizer)}
    if gan_weight:
        with frozen(teacher, discriminator):
            terms["gan"] = gan_weight * gan_loss(discriminator(teacher.taps(x_hat_t, t, c, taps)), as_real=True)
    return terms


def stage2_critic_loss(x_hat, x, teacher, fake_score, discriminator, c=None, *, t, noise, noise_real, gan_weight=0.03,
                       taps=()) -> dict:  # fmt: skip
    """Losses of the critics on x_hat and real x: {"fake": denoising, "disc": GAN}. THE STUDENT TAKES NO GRADIENT."""
    x_hat = x_hat.detach()
    terms = {"fake": denoising_loss(fake_score, x_hat, noise, t, c)}
    if gan_weight:
        with torch.no_grad():  # choice: same t, different noise for real and fake
            fake = teacher.taps(interpolate(x_hat, noise, t), t, c, taps)
            real = teacher.taps(interpolate(x, noise_real, t), t, c, taps)
        terms["disc"] = gan_loss(discriminator(real), as_real=True) + gan_loss(discriminator(fake), as_real=False)
    return terms


# ---- A phase of training: nets, optimizers, EMA, every RNG, and how they are saved -----------------------------------


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or belongs to another run."""


def atomic_save(state: dict, path: str) -> None:
    """torch.save to a temporary file, fsync, rename: a kill at any moment leaves the old file or the new one."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def safe_load(path: str) -> dict:
    """torch.load(weights_only=True), its failures told in one sentence."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as e:
        what = f"{path} is truncated or not a checkpoint ({type(e).__name__})"
        raise CheckpointError(f"{what}; delete it to start this phase again.") from e


def seed_everything(seed: int, device="cpu") -> torch.Generator:
    """Seed torch's global generators (weights) and return a generator of its own for data and draws."""
    torch.manual_seed(seed)
    return torch.Generator(device).manual_seed(seed)


class Phase:
    """One training phase and all it needs to stop and go on: nets, AdamW per trained net, EMA, step, config, RNGs, log.

    `nets` maps names to the trained modules, `averaged` names the one whose EMA is kept. `config` (plain values) is
    stored with the checkpoint and compared on load. Paper's AdamW: weight decay 0.01, betas (0.9, 0.99), eps 1e-8.
    """

    average = staticmethod(lambda net: copy.deepcopy(net).requires_grad_(False))  # what holds the EMA
    coin = None  # stage 1's choice of r < s: a generator that processes share, where they wait for each other
    KEPT = ("name", "config", "step", "seconds", "log", "ema_updates")  # the plain values of a checkpoint

    def __init__(self, name, nets: dict, averaged: str, lr: float, ema: float, seed: int, config, clip=1.0):
        self.name, self.nets, self.averaged, self.config = name, nets, averaged, config or {}
        self.generator = seed_everything(seed, next(nets[averaged].parameters()).device)
        self.ema_decay, self.clip, self.step, self.seconds, self.log = ema, clip, 0, 0.0, []
        self.optimizers = {
            # choice: no warm-up, no decay (but train_teacher's), and the gate learns at the rate of the rest
            key: torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8, fused=True)
            for key, net in nets.items()
        }
        self.ema, self.ema_updates = self.average(nets[averaged]), 0

    def follow(self, net) -> None:
        """Move the EMA toward `net`."""
        self.ema_updates += 1
        decay = min(self.ema_decay, self.ema_updates / (self.ema_updates + 10))  # choice: short memory at the start
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(net.parameters()), 1 - decay)

    def check(self, what: str, value: torch.Tensor) -> None:
        if not bool(torch.isfinite(value)):
            told = f"{self.name}: {what} is {value.item()} at step {self.step}"
            raise FloatingPointError(f"{told}; lower the rate, the checkpoint is kept.")

    def update(self, name: str, terms: dict) -> dict:
        """Backward through the sum of `terms`, clip (choice: norm 1), step the optimizer of net `name`, then its EMA.

        Returns `terms`. A term or gradient that is not finite is a FloatingPointError, before it reaches a weight.
        """
        for term, value in terms.items():
            self.check(f"loss term {term!r}", value)
        self.optimizers[name].zero_grad(set_to_none=True)
        with torch.autocast(self.generator.device.type, enabled=False):  # else float32 gradients would be rounded
            sum(terms.values()).backward()
        self.check(f"gradient norm of {name!r}", nn.utils.clip_grad_norm_(self.nets[name].parameters(), self.clip))
        self.optimizers[name].step()
        if name == self.averaged:
            self.follow(self.nets[name])
        return terms

    def parts(self) -> dict:
        """Everything with a state_dict, by name."""
        return {**self.nets, **{f"{key} optimizer": o for key, o in self.optimizers.items()}, "ema": self.ema}

    def save(self, path: str) -> None:
        """Everything, in one dict of tensors and plain values, atomically."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        rng = {"phase": self.generator.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}
        kept = {key: getattr(self, key) for key in self.KEPT}
        atomic_save({**kept, "parts": {key: part.state_dict() for key, part in self.parts().items()}, "rng": rng}, path)

    def load(self, path: str) -> None:
        """Restore everything from `path`; CheckpointError if it is unreadable or of another phase or config."""
        state = safe_load(path)
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise CheckpointError(f"{path} is not a checkpoint of this program; give another output folder.")
        if state.get("name") != self.name or state["config"] != self.config:
            old, new = state["config"], self.config
            keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k)) or ["phase"]
            told = f"{path} was made with another {', '.join(keys)}"
            raise CheckpointError(f"{told}; give the same settings or another output folder.")
        try:
            for key, part in self.parts().items():
                part.load_state_dict(state["parts"][key])
            for key in self.KEPT:
                setattr(self, key, state[key])
            self.generator.set_state(state["rng"]["phase"])
            torch.set_rng_state(state["rng"]["torch"])
            if torch.cuda.is_available() and state["rng"]["cuda"]:
                torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        except (KeyError, RuntimeError, ValueError) as e:
            told = f"{path} holds networks of another shape"
            raise CheckpointError(f"{told}; give the same settings or another output folder.") from e

    def run(self, iterate, steps: int, path: str | None = None, save_every: int = 1000, on_step=None, progress=True):
        """Call iterate(self) -> terms until `steps`; save to `path`, resume from it; on_step(self, terms) may log.

        Returns the EMA of the averaged net. on_step MUST NOT draw from the phase's generator, or resuming would differ.
        """
        if path and os.path.exists(path):
            self.load(path)
        quiet = None if progress else True  # None: quiet where there is no terminal
        bar = tqdm(total=steps, initial=self.step, desc=self.name, disable=quiet, leave=True, mininterval=0.5)
        while self.step < steps:
            start = time.perf_counter()
            terms = iterate(self)
            self.step += 1
            self.seconds += time.perf_counter() - start
            bar.update()
            if on_step:
                on_step(self, terms)
            if path and (self.step % save_every == 0 or self.step == steps):
                self.save(path)
        bar.close()
        return self.ema


# ---- The four trainings: teacher, stage 1, KD warm-up, stage 2 -------------------------------------------------------
# data(n, generator) -> (x (n, *D), c (n, *C) or None); make: a Phase that knows more (many GPUs, gradient accumulation)


def train_teacher(net, data, *, updates, batch, lr, cond_drop=0.1, c_neg=None, t_shift=1, ema=0.999, decay=0.0, seed=0,
                  config=None, make=Phase, **run):  # fmt: skip
    """Flow matching of data with condition dropout (Eq. 2); returns the EMA. `run` goes to Phase.run.

    `decay`: the share of the updates, at the end, over which the learning rate falls linearly to zero.
    """
    own = {"batch": batch, "lr": lr, "cond_drop": cond_drop, "t_shift": t_shift, "ema": ema, "seed": seed}
    if decay:
        own |= {"decay": decay, "updates": updates}
    phase = make("teacher", {"teacher": net}, "teacher", lr, ema, seed, {**own, **(config or {})})

    def iterate(phase):
        g = phase.generator
        x, c = data(batch, g)
        if c is not None:
            c = drop_condition(c, c_neg, torch.rand(len(x), generator=g, device=x.device) < cond_drop)
        if decay:
            left = (updates - phase.step) / (decay * updates)
            phase.optimizers["teacher"].param_groups[0]["lr"] = lr * min(1.0, left)
        loss = denoising_loss(net, x, randn_like(x, g), sample_times(x, t_shift, g), c)
        return phase.update("teacher", {"denoising": loss})

    return phase.run(iterate, updates, **run), phase


def train_stage1(student, data, how: StudentConfig, cfg: Stage1Config, *, c_neg=None, seed=0, config=None, make=Phase,
                 **run):  # fmt: skip
    """Stage 1: TM-MF pretraining of the student (Algorithm 2); returns its EMA and the phase."""
    own = {**asdict(how), **asdict(cfg), "seed": seed}
    phase = make("stage1", {"student": student}, "student", cfg.lr, cfg.ema, seed, own | (config or {}))

    def iterate(phase):
        x, c = data(cfg.batch, phase.generator)
        draws = stage1_draw(x, how.outer_grid, how.inner_grid, cfg.s_shift, cfg.flow_map_share, cfg.cond_drop,
                            phase.generator, phase.coin)  # fmt: skip
        loss = tm_mf_loss(student, x, c, **draws, c_neg=c_neg, guidance=cfg.guidance, target=how.target,
                          field=how.field, derivative=cfg.derivative, fd_step=cfg.fd_step,
                          adaptive_c=cfg.adaptive_c)  # fmt: skip
        return phase.update("student", {"tm_mf": loss})

    return phase.run(iterate, cfg.updates, **run), phase


def train_kd(student, pairs, how: StudentConfig, *, updates, lr, ema=0.99, seed=0, config=None, make=Phase, **run):
    """KD warm-up (M = 1): regress x_hat from noise onto the teacher's sample of it. pairs(generator) -> (x_1, x, c)."""
    config = {**asdict(how), "lr": lr, "ema": ema, "seed": seed, **(config or {})}
    phase = make("kd", {"student": student}, "student", lr, ema, seed, config)

    def iterate(phase):
        x_1, x, c = pairs(phase.generator)
        t = how.outer_grid[-1].to(x.device).expand(len(x))
        predict, y_1 = transition(student, x_1, t, c, how.target), randn_like(x, phase.generator)
        y_hat = inner_flow(predict, y_1, how.inner_grid, how.field)
        return phase.update("student", {"kd": (clean_estimate(y_hat, x_1, t, how.target) - x).square().mean()})

    return phase.run(iterate, updates, **run), phase


def train_stage2(student, teacher, discriminator, data, how: StudentConfig, cfg: Stage2Config, *, taps, c_neg=None,
                 fake_score=None, seed=0, config=None, make=Phase, **run):  # fmt: skip
    """Stage 2: DMD2-v with rollout (PlainStudent: DMD2-v). The fake score starts as the teacher. Returns EMA, phase."""
    config = {**asdict(how), **asdict(cfg), "taps": list(taps), "seed": seed, **(config or {})}
    fake_score = copy.deepcopy(teacher).requires_grad_(True) if fake_score is None else fake_score
    nets = {"student": student, "fake": fake_score, "disc": discriminator}
    phase = make("stage2", nets, "student", cfg.lr, cfg.ema, seed, config)
    gan = {"gan_weight": cfg.gan_weight, "taps": taps}

    def iterate(phase):
        g = phase.generator
        x, c = data(cfg.batch, g)
        is_student = (phase.step + 1) % cfg.student_every == 0  # choice: the critics go first
        with torch.set_grad_enabled(is_student):
            x_hat = generate(student, x, c, outer_grid=how.outer_grid, inner_grid=how.inner_grid, generator=g,
                             target=how.target, field=how.field, clean=how.clean, rollout=cfg.rollout)  # fmt: skip
        t, noise = sample_times(x, cfg.dmd_shift, g, how.outer_grid.dtype), randn_like(x, g)
        if is_student:
            terms = stage2_student_loss(x_hat, teacher, fake_score, discriminator, c, c_neg, t=t, noise=noise,
                                        guidance=cfg.guidance, normalizer=cfg.normalizer, **gan)  # fmt: skip
            return phase.update("student", terms)
        terms = stage2_critic_loss(x_hat, x, teacher, fake_score, discriminator, c, t=t, noise=noise,
                                   noise_real=randn_like(x, g), **gan)  # fmt: skip
        for key, value in terms.items():
            phase.update(key, {key: value})
        return terms

    return phase.run(iterate, cfg.iterations, **run), phase
