"""tmd_minimal.py piece by piece: grids, the split, who receives gradient, du/ds, and every limit that is known."""

import copy

import pytest
import torch
from torch.testing import assert_close

import tmd_minimal as tmd
from toys.oracles import GaussianInnerFlow, GaussianMixture
from toys.planar import PlanarDiscriminator, PlanarNet

F64 = torch.float64
CLASSES = 3


@pytest.fixture
def teacher():
    return PlanarNet(2, 32, 4, CLASSES).double()


def perturbed(module, scale=0.05):
    """A copy with every parameter moved, so that nothing is zero by initialisation."""
    module = copy.deepcopy(module)
    g = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data += scale * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return module


def batch(g, n=16, shape=(2,)):
    x = torch.randn(n, *shape, generator=g, dtype=F64)
    return x, torch.randint(CLASSES, (n,), generator=g)


def draws(x, g, M=2, N=2, **kw):
    d = tmd.stage1_draw(x, tmd.make_grid(M, 10.0), tmd.make_grid(N, 10.0), generator=g, **kw)
    return {k: v.double() if v.is_floating_point() else v for k, v in d.items()}


# -- time and noise ---------------------------------------------------------------------------------------------------


def test_grids_of_the_paper():
    """Shift 10, t_M = 0.999: M = 2 has its middle time at 0.909 (paper.md 9.3); grids increase from 0."""
    assert_close(tmd.make_grid(2, 10.0), torch.tensor([0, 10 / 11, 0.999]))
    assert_close(tmd.make_grid(1, 10.0), torch.tensor([0, 0.999]))
    for steps, gamma in ((4, 10.0), (50, 5.0), (4, 0.25)):
        assert (tmd.make_grid(steps, gamma).diff() > 0).all()


def test_shift_is_the_stated_map_and_shifts_compose():
    """shift(t, gamma) = gamma t / ((gamma-1) t + 1): fixed ends, inverse 1/gamma, composition multiplies."""
    t = torch.linspace(0, 1, 11, dtype=F64)
    assert tmd.shift(0.5, 10.0) == pytest.approx(5 / 5.5)
    assert_close(tmd.shift(tmd.shift(t, 3.0), 1 / 3.0), t)
    assert_close(tmd.shift(tmd.shift(t, 3.0), 5.0), tmd.shift(t, 15.0))


def test_interpolation_runs_from_data_to_noise(g):
    """Eq. (1), Eq. (5): time 0 is data, time 1 is noise, linear between, whatever the rank."""
    x, noise = torch.randn(3, 4, 5, generator=g, dtype=F64), torch.randn(3, 4, 5, generator=g, dtype=F64)
    x_t = tmd.interpolate(x, noise, torch.tensor([0.0, 0.25, 1.0], dtype=F64))
    assert_close(x_t[0], x[0])
    assert_close(x_t[1], 0.75 * x[1] + 0.25 * noise[1])
    assert_close(x_t[2], noise[2])


def test_s_r_sampling(g):
    """Section 5: r = s on three quarters; else r is the largest inner grid time not above s; s is in [0.001, 0.999]."""
    x, grid = torch.zeros(40_000, 2), tmd.make_grid(4, 10.0)
    s, r = tmd.sample_s_r(x, grid, 3.0, 0.25, g)
    assert s.min() >= 0.001 and s.max() <= 0.999 and (r <= s).all()
    is_map = r < s
    assert is_map.float().mean() == pytest.approx(0.25, abs=0.01)
    brute = torch.stack([grid[grid <= one].max() for one in s[is_map]])
    assert_close(r[is_map], brute, rtol=0, atol=0)
    assert (s < 0.75).float().mean() == pytest.approx(0.5, abs=0.01)  # median of shift(U, 3)


def test_a_shared_coin_chooses_alike():
    """Batches that share a coin take r < s in the same places, at other s; nothing else is drawn from it."""
    x, grid, made = torch.zeros(64, 2), tmd.make_grid(4, 10.0), lambda seed: torch.Generator().manual_seed(seed)
    (s, r), (other, below) = (tmd.sample_s_r(x, grid, 3.0, 0.25, made(i), made(7)) for i in (2, 3))
    assert torch.equal(r < s, below < other) and 0 < (r < s).sum() < 64 and not torch.equal(s, other)
    assert torch.equal(s, tmd.sample_s_r(x, grid, 3.0, 0.25, made(2))[0])
    alone, shared = (tmd.stage1_draw(x, grid, grid, generator=made(2), coin=coin) for coin in (None, made(7)))
    assert not torch.equal(alone["r"], shared["r"]) and torch.equal(shared["r"], r)


def test_outer_times_are_uniform_over_the_grid(g):
    """t_i uniform over t_1 ... t_M; t_0 = 0 is never drawn."""
    grid = tmd.make_grid(4, 10.0)
    t = tmd.sample_outer(torch.zeros(40_000, 1), grid, g)
    counts = torch.stack([(t == q).float().mean() for q in grid])
    assert counts[0] == 0 and (counts[1:] - 0.25).abs().max() < 0.01


# M, N, H, L, effective NFE
ROWS = [(1, 2, 5, 30, 1.17), (2, 2, 5, 30, 2.33), (1, 4, 5, 30, 1.50), (2, 4, 5, 30, 3.00),
        (1, 4, 5, 40, 1.38), (2, 4, 5, 40, 2.75), (1, 1, 5, 30, 1), (2, 1, 0, 30, 2)]  # fmt: skip


@pytest.mark.parametrize("M,N,H,L,nfe", ROWS)
def test_effective_nfe_of_every_row(M, N, H, L, nfe):
    """Eq. (16) gives every effective NFE in the paper's tables."""
    assert tmd.effective_nfe(M, N, H, L) == pytest.approx(nfe, abs=0.006)


# -- the split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["gated", "concat"])
@pytest.mark.parametrize("H", [1, 2, 3])
def test_student_equals_teacher_at_initialisation(teacher, fusion, H, g):
    """Section 3: at s = t the student predicts the teacher's velocity, exactly where y_s has no share in the fusion.

    Within 15 % at the default gate, sigmoid(-3) = 0.05, and at concat's N(0, 0.01^2).
    """
    teacher = perturbed(teacher)
    x, c = batch(g, 256)
    t = torch.rand(256, generator=g, dtype=F64) * 0.9 + 0.05
    y_s, v = torch.randn(256, 2, generator=g, dtype=F64), teacher(x, t, c)
    student = tmd.TMDStudent(teacher, H, fusion).double()
    error = (student.head(y_s, t, t * 0.5, student.features(x, t, c)) - v).norm() / v.norm()
    assert 0 < error < 0.15
    if fusion == "gated":
        student.gate.data.fill_(-60.0)
    else:
        student.fuse.weight.data[:, 32:] = 0
    assert_close(student.head(y_s, t, t * 0.5, student.features(x, t, c)), v, atol=1e-12, rtol=0)


def test_plain_student_makes_every_function_dmd2v(teacher, g):
    """Section 6: with PlainStudent and N = 1, x_hat is x_t - t v(x_t, t), and one transition is one Euler step."""
    student = tmd.PlainStudent(perturbed(teacher))
    x, c = batch(g)
    grid, inner = tmd.make_grid(2, 10.0), tmd.make_grid(1, 10.0)
    state = g.get_state()
    x_hat = tmd.generate(student, x, c, outer_grid=grid, inner_grid=inner, generator=g)
    g.set_state(state)
    t = tmd.sample_outer(x, grid, g)
    x_t = tmd.interpolate(x, tmd.randn_like(x, g), t)
    assert_close(x_hat, tmd.velocity_to_clean(x_t, t, student.net(x_t, t, c)))
    x_1 = torch.randn(16, 2, generator=g, dtype=F64)
    with torch.no_grad():
        expected = tmd.sample_teacher(student.net, x_1, c, grid=grid)
    assert_close(tmd.sample(student, x_1, c, outer_grid=grid, inner_grid=inner), expected)


def test_algorithm_1_is_the_paper_s_update(teacher, g):
    """Alg. 1 / Eq. (4): x_{t'} = x_t - (t - t') y, with y from the inner flow; written out by hand here."""
    student = perturbed(tmd.TMDStudent(teacher, 2)).double()
    outer, inner = tmd.make_grid(2, 10.0).double(), tmd.make_grid(2, 10.0).double()
    x_1, c = batch(g)
    g2 = torch.Generator().manual_seed(5)
    got = tmd.sample(student, x_1, c, outer_grid=outer, inner_grid=inner, generator=torch.Generator().manual_seed(5))
    x, full = x_1, torch.ones(16, dtype=F64)
    with torch.no_grad():
        for i in (2, 1):
            m = student.features(x, outer[i] * full, c)
            y_1 = y = torch.randn(16, 2, generator=g2, dtype=F64)
            assert y_1.shape == x.shape
            for j in (2, 1):
                head = student.head(y, inner[j] * full, inner[j - 1] * full, m)
                y = y - (inner[j] - inner[j - 1]) * (y - head) / inner[j]
            x = x - (outer[i] - outer[i - 1]) * y
    assert_close(got, x)


@pytest.mark.parametrize("M,N", [(1, 1), (1, 4), (2, 2), (3, 4)])
def test_sampling_runs_the_backbone_m_times_and_the_head_m_n_times(teacher, M, N, g):
    """Eq. (16) counts M runs of the backbone and M N runs of the head; sampling makes as many."""
    calls = {"features": 0, "head": 0}

    class Counted(tmd.TMDStudent):
        def features(self, *a):
            calls["features"] += 1
            return super().features(*a)

        def head(self, *a):
            calls["head"] += 1
            return super().head(*a)

    student = Counted(teacher, 1).double()
    x, c = batch(g)
    tmd.sample(student, x, c, outer_grid=tmd.make_grid(M, 10.0), inner_grid=tmd.make_grid(N, 10.0), generator=g)
    assert calls == {"features": M, "head": M * N}


def test_target_x_starts_as_the_same_student(teacher, g):
    """Eq. (3), B.4: with a closed gate and N = 1, target x samples the teacher's estimate as target x_1 - x does."""
    student = tmd.TMDStudent(teacher, 2, gate_init=-60.0).double()
    x_1, c = batch(g)
    grids = {"outer_grid": tmd.make_grid(1, 10.0), "inner_grid": tmd.make_grid(1, 10.0)}
    a, b = (tmd.sample(student, x_1, c, target=target, **grids, generator=g) for target in ("x1-x", "x"))
    assert_close(a, b)


@pytest.mark.parametrize("shape", [(2,), (3, 4), (4, 2, 3, 5)])
@pytest.mark.parametrize("target", ["x1-x", "x"])
@pytest.mark.parametrize("field,clean", [("consistent", "consistent"), ("printed", "printed")])
def test_any_rank_runs_every_algorithm_function(shape, target, field, clean, g):
    """Every function takes (B, *D): a point, a matrix, a video (C, T, H, W)."""

    class Anything(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(0.5, dtype=F64))

        def features(self, x_t, t, c=None):
            return self.a * x_t

        def head(self, y_s, s, r, m):
            return m + self.a * y_s * (1 + tmd.bcast(s - r, y_s))

        def forward(self, x_t, t, c=None):
            return self.a * x_t

    net, x = Anything(), torch.randn(6, *shape, generator=g, dtype=F64)
    outer, inner = tmd.make_grid(2, 3.0).double(), tmd.make_grid(2, 3.0).double()
    how = {"outer_grid": outer, "inner_grid": inner, "target": target, "field": field, "generator": g}
    tmd.tm_mf_loss(net, x, **draws(x, g), target=target, field=field).backward()
    x_hat = tmd.generate(net, x, **how, clean=clean)
    draw = {"t": torch.rand(6, generator=g, dtype=F64), "noise": torch.randn(x.shape, generator=g, dtype=F64)}
    sum(tmd.stage2_student_loss(x_hat, net, net, None, **draw, gan_weight=0).values()).backward()
    critic = tmd.stage2_critic_loss(x_hat, x, net, net, None, **draw, noise_real=draw["noise"], gan_weight=0)
    critic["fake"].backward()
    assert tmd.sample(net, x, **how).shape == x.shape
    assert tmd.sample_teacher(net, x, grid=outer, method="heun").shape == x.shape


# -- stage 1 ----------------------------------------------------------------------------------------------------------


def exact_tm_mf(student, x, c, d, field, guidance=1.0, target="x1-x"):
    """The loss of TM-MF written out once more, by hand: du/ds by JVP through u itself, the target as a constant."""
    b = lambda t: t.reshape(-1, 1)
    t, s, r, x_1, y_1 = d["t"], d["s"], d["r"], d["x_1"], d["y_1"]
    none = torch.full_like(c, CLASSES)
    x_t = (1 - b(t)) * x + b(t) * x_1
    y = x_1 - x if target == "x1-x" else x
    y_s, v = (1 - b(s)) * y + b(s) * y_1, y_1 - y

    def velocity(y_s, s, r, c):
        head = student.head(y_s, s, r, student.features(x_t, t, c))
        head = head if target == "x1-x" else x_t - b(t) * head
        return y_1 - head if field == "printed" else (y_s - head) / b(s)

    if guidance != 1.0:
        v = torch.where(b(d["dropped"]), v, guidance * v + (1 - guidance) * velocity(y_s, s, s, none).detach())
    c_in = torch.where(d["dropped"], none, c)
    _, du_ds = torch.func.jvp(lambda y_s, s: velocity(y_s, s, r, c_in), (y_s, s), (v, torch.ones_like(s)))
    goal = (v - b(s - r) * du_ds).detach()
    u = velocity(y_s, s, r, c_in)
    error = (u - goal) * (b(s) if field == "consistent" else 1)
    square = error.square().sum(1)
    return (square / (square + 2).detach()).mean()


@pytest.mark.parametrize("field", ["consistent", "printed"])
@pytest.mark.parametrize("target", ["x1-x", "x"])
def test_tm_mf_loss_and_gradient_against_a_second_writing(teacher, field, target, g):
    """Eq. (8)-(10), (14): the loss and every gradient agree with TM-MF written out by hand.

    Guided, with dropped conditions, s down to 0.001. With JVP they are equal; with finite differences the loss is
    within 3 % and the gradient at a cosine above 0.98.
    """
    student = perturbed(tmd.TMDStudent(teacher, 2), 0.1).double()
    x, c = batch(g, 256)
    d = draws(x, g, flow_map_share=0.7, cond_drop=0.3)
    d["s"][:20] = torch.linspace(0.001, 0.02, 20, dtype=F64)
    d["r"] = torch.minimum(d["r"], d["s"])
    d["r"][:20] = 0.0
    expected = exact_tm_mf(student, x, c, d, field, 3.0, target)
    gradient = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    how = {"c_neg": CLASSES, "guidance": 3.0, "target": target, "field": field}
    for derivative in ("jvp", "fd"):
        loss = tmd.tm_mf_loss(student, x, c, **d, **how, derivative=derivative)
        got = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
        if derivative == "jvp":
            assert_close(loss, expected)
            for a, b in zip(got, gradient):
                assert (a is None) == (b is None)
                if a is not None:
                    assert_close(a, b, rtol=1e-6, atol=1e-10)
        else:
            assert_close(loss, expected, rtol=0.03, atol=0)
            a, b = (torch.cat([q.flatten() for q in grads if q is not None]) for grads in (got, gradient))
            assert torch.cosine_similarity(a, b, 0) > 0.98


def test_head_depends_on_s_minus_r(teacher, g):
    """Section 3: the second embedding is of s - r, and another r gives another output."""
    student = perturbed(tmd.TMDStudent(teacher, 2), 0.3).double()
    seen = []
    student.span.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, c = batch(g)
    s, r = torch.rand(16, generator=g, dtype=F64), torch.zeros(16, dtype=F64)
    m = student.features(x, s, c)
    assert (student.head(x, s, r, m) - student.head(x, s, s, m)).abs().max() > 1e-3
    assert_close(seen[0], s)
    assert_close(seen[1], torch.zeros_like(s))


def test_derivative_is_one_sided_at_the_borders(g):
    """The finite difference never leaves [0.001, 0.999], and is right at both ends for a linear function."""
    seen = []

    def f(y, s):
        seen.append(s)
        return 3 * y + tmd.bcast(s, y)

    s = torch.tensor([0.001, 0.003, 0.5, 0.997, 0.999], dtype=F64)
    y, v = torch.randn(5, 2, generator=g, dtype=F64), torch.randn(5, 2, generator=g, dtype=F64)
    assert_close(tmd.total_derivative(f, y, s, v), 3 * v + 1)
    assert torch.stack(seen).min() >= 0.001 and torch.stack(seen).max() <= 0.999


def test_derivative_runs_in_float32_under_bf16(g):
    """Trap 7: in bf16 a finite difference of step 0.005 is mostly rounding; ours runs in float32, outside autocast."""
    net = torch.nn.Linear(8, 8)
    f = lambda y, s: torch.tanh(net(y)) * tmd.bcast(s, y)
    y, v, s = torch.randn(64, 8, generator=g), torch.randn(64, 8, generator=g), torch.full((64,), 0.5)
    exact = tmd.total_derivative(f, y, s, v, "jvp")
    with torch.autocast("cpu", torch.bfloat16):
        inside = tmd.total_derivative(f, y.bfloat16(), s, v.bfloat16())
        naive = (f(y + 0.005 * v, s + 0.005) - f(y - 0.005 * v, s - 0.005)) / 0.01
    assert inside.dtype == torch.float32
    error = lambda d: ((d - exact).norm() / exact.norm()).item()
    assert error(inside) < 0.01 < 0.1 < error(naive)


def test_tm_mf_reduces_to_tm_where_r_is_s(teacher, g):
    """Eq. (6): with r = s the loss is flow matching of the inner flow: the head's error in both fields, no du/ds."""
    student = perturbed(tmd.TMDStudent(teacher, 2)).double()
    x, c = batch(g)
    d = draws(x, g, flow_map_share=0.0)
    y_s = tmd.interpolate(d["x_1"] - x, d["y_1"], d["s"])
    head = student.head(y_s, d["s"], d["s"], student.features(tmd.interpolate(x, d["x_1"], d["t"]), d["t"], c))
    square = (head - (d["x_1"] - x)).square().sum(1)
    expected = (square / (square + 2)).mean()
    d.pop("dropped")
    for field in ("consistent", "printed"):
        assert_close(tmd.tm_mf_loss(student, x, c, **d, field=field), expected)


@pytest.mark.parametrize("field", ["consistent", "printed"])
@pytest.mark.parametrize("derivative", ["fd", "jvp"])
def test_tm_mf_gradient_vanishes_at_the_closed_form_alone(field, derivative, g):
    """Eq. (8)-(10): tm_mf_loss's expected gradient is zero at the exact average velocity of y ~ N(mu, sigma^2) alone.

    Where sigma is off by a fifth it is not zero.
    """
    sigma, mean, n = 0.6, 0.4, 16_000
    y_1, x_1 = torch.randn(n, 1, generator=g, dtype=F64), torch.randn(n, 1, generator=g, dtype=F64)
    x = x_1 - mean - sigma * torch.randn(n, 1, generator=g, dtype=F64)  # so that y = x_1 - x is what the oracle expects

    class Bent(GaussianInnerFlow):
        """The oracle's head plus a . (1, y_s), a = 0: the two directions in which a linear head can move."""

        def head(self, y_s, s, r, m=None):
            return super().head(y_s, s, r) + self.a[0] + self.a[1] * y_s

    def t_statistic(sigma):
        head, parts = Bent(sigma, field, mean), []
        for k in range(20):
            rows = slice(k * n // 20, (k + 1) * n // 20)
            head.a = torch.zeros(2, dtype=F64, requires_grad=True)
            t, s, r = (torch.full((n // 20,), value, dtype=F64) for value in (0.9, 0.7, 0.2))
            drawn = {"x_1": x_1[rows], "y_1": y_1[rows], "t": t, "s": s, "r": r}
            loss = tmd.tm_mf_loss(head, x[rows], **drawn, field=field, derivative=derivative, adaptive_c=1e6)
            parts.append(torch.autograd.grad(loss, head.a)[0])
        parts = torch.stack(parts)
        return (parts.mean(0) / (parts.std(0) / 20**0.5)).abs()

    assert (t_statistic(sigma) < 4).all() and (t_statistic(1.2 * sigma) > 8).any()


def test_guidance_and_condition_dropout(teacher, g):
    """Section 5.4: v_cfg = w v + (1-w) u(y_s, s, s; m(c_neg)); dropped samples get c_neg and the unguided v."""
    student = perturbed(tmd.TMDStudent(teacher, 2), 0.2).double()
    x, c = batch(g)
    d = draws(x, g, flow_map_share=0.0, cond_drop=0.5)
    assert 0 < d["dropped"].sum() < 16
    w = 3.0
    x_t, y = tmd.interpolate(x, d["x_1"], d["t"]), d["x_1"] - x
    y_s, v = tmd.interpolate(y, d["y_1"], d["s"]), d["y_1"] - y
    s, none = d["s"], torch.full((16,), CLASSES)
    c_in = torch.where(d["dropped"], none, c)
    u_neg = (y_s - student.head(y_s, s, s, student.features(x_t, d["t"], none))) / s[:, None]
    goal = torch.where(d["dropped"][:, None], v, w * v + (1 - w) * u_neg)
    u = (y_s - student.head(y_s, s, s, student.features(x_t, d["t"], c_in))) / s[:, None]
    square = ((u - goal) * s[:, None]).square().sum(1)
    assert_close(tmd.tm_mf_loss(student, x, c, **d, c_neg=CLASSES, guidance=w), (square / (square + 2)).mean())


def test_adaptive_constant_of_14b():
    """Trap 4: Table 7 means c = 1e-5 d, not "10 d 5": an error of ||e||^2 = 1e-5 d is weighted by a half."""
    loss = tmd.adaptive_loss(torch.full((3, 8), 1e-5**0.5, dtype=F64), 1e-5)
    assert loss.item() == pytest.approx(0.5) and tmd.Stage1Config(adaptive_c=1e-5).adaptive_c == 1e-5


def test_guidance_convention(teacher, g):
    """Trap 6: v_neg + w (v - v_neg); w = 1 is the conditional velocity, w = 0 the unconditional."""
    teacher = perturbed(teacher)
    x, c = batch(g)
    t = torch.rand(16, generator=g, dtype=F64)
    v, v_neg = teacher(x, t, c), teacher(x, t, None)
    for w in (0.0, 1.0, 3.0):
        assert_close(tmd.guided(teacher, x, t, c, CLASSES, w), v_neg + w * (v - v_neg))


def test_adaptive_loss_is_the_stated_ratio(g):
    """Section 5.6: ||e||^2 / sg(||e||^2 + c d) per sample; its gradient is 2 e / (||e||^2 + c d), so bounded."""
    e = torch.randn(5, 3, 2, generator=g, dtype=F64).requires_grad_()
    square = e.detach().flatten(1).square().sum(1)
    loss = tmd.adaptive_loss(e, 0.5)
    assert_close(loss.detach(), (square / (square + 3.0)).mean())
    loss.backward()
    assert_close(e.grad, 2 * e.detach() / (square + 3.0)[:, None, None] / 5)


# -- who receives gradient --------------------------------------------------------------------------------------------


def grads(module):
    return {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_stage1_trains_backbone_and_head(teacher, g):
    """Alg. 2: backbone and head get gradient, every parameter but span's first layer (its last is 0 at the start)."""
    student = tmd.TMDStudent(teacher, 2).double()
    x, c = batch(g, 64)
    tmd.tm_mf_loss(student, x, c, **draws(x, g, cond_drop=0.3), c_neg=CLASSES, guidance=3.0).backward()
    missing = {n for n, _ in student.named_parameters()} - grads(student)
    assert missing == {"span.mlp.0.weight", "span.mlp.0.bias"}


def test_span_embedding_learns(teacher, g):
    """Section 3: only the last layer of the s - r embedding is zero, so after one step its first layer learns too."""
    student = tmd.TMDStudent(teacher, 2).double()
    x, c = batch(g, 64)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    m = student.features(x, torch.full((64,), 0.9, dtype=F64), c)
    s = torch.full((64,), 0.8, dtype=F64)
    head = lambda r: student.head(x, s, r, m)
    assert_close(head(s), head(0 * s), atol=0, rtol=0)  # at the start the head does not know r
    for _ in range(2):
        optimizer.zero_grad()
        tmd.tm_mf_loss(student, x, c, **draws(x, g, flow_map_share=1.0), c_neg=CLASSES).backward()
        optimizer.step()
    assert {"span.mlp.0.weight", "span.mlp.2.weight"} <= grads(student)
    m = student.features(x, torch.full((64,), 0.9, dtype=F64), c)
    assert (head(s) - head(0 * s)).abs().max() > 1e-6


def stage2_parts(teacher):
    student = perturbed(tmd.TMDStudent(teacher, 2)).double()
    return student, copy.deepcopy(teacher), PlanarDiscriminator(32, 2).double()


def test_student_update_touches_only_the_student(teacher, g):
    """Section 6: VSD and GAN losses reach every student parameter and none of teacher, fake score, discriminator."""
    student, fake, disc = stage2_parts(teacher)
    teacher.requires_grad_(True)  # even then
    x, c = batch(g, 64)
    grids = {"outer_grid": tmd.make_grid(2, 10.0), "inner_grid": tmd.make_grid(2, 10.0)}
    x_hat = tmd.generate(student, x, c, **grids, generator=g)
    t, noise = tmd.sample_times(x, 5.0, g), tmd.randn_like(x, g)
    terms = tmd.stage2_student_loss(x_hat, teacher, fake, disc, c, CLASSES, t=t, noise=noise, taps=(1, 3))
    for part in terms.values():
        student.zero_grad()
        part.backward(retain_graph=True)
        assert {n.split(".")[0] for n in grads(student)} >= {"net", "fuse", "gate"}
    assert not grads(teacher) and not grads(fake) and not grads(disc)
    assert all(p.requires_grad for p in disc.parameters())  # frozen() has let go


def test_stage2_losses_are_what_they_say(teacher, g):
    """Section 6: every term of stage 2 equals a second writing of it.

    VSD with its normaliser and guidance, GAN with the right labels, noise and weight.
    """
    _, fake, disc = stage2_parts(teacher)
    teacher, fake = perturbed(teacher), perturbed(fake, 0.1)
    x, c = batch(g, 32)
    x_hat, t = torch.randn(32, 2, generator=g, dtype=F64).requires_grad_(), tmd.sample_times(x, 5.0, g)
    noise, noise_real = tmd.randn_like(x, g), tmd.randn_like(x, g)
    b = t[:, None].double()
    x_hat_t, x_t = (1 - b) * x_hat + b * noise, (1 - b) * x + b * noise_real
    v, v_neg = teacher(x_hat_t, t, c), teacher(x_hat_t, t, None)
    g_teacher, g_fake = x_hat_t - b * (v_neg + 4.0 * (v - v_neg)), x_hat_t - b * fake(x_hat_t, t, c)
    softplus = torch.nn.functional.softplus
    for normalizer in ("dmd", "paper"):
        size = (x_hat if normalizer == "dmd" else g_fake) - g_teacher
        expected = ((g_fake - g_teacher) / size.abs().mean(1, keepdim=True)).detach()
        kw = {"t": t, "noise": noise, "taps": (1, 3), "gan_weight": 0.5}
        how = {"guidance": 4.0, "normalizer": normalizer, **kw}
        terms = tmd.stage2_student_loss(x_hat, teacher, fake, disc, c, CLASSES, **how)
        assert_close(torch.autograd.grad(terms["vsd"], x_hat)[0] * x_hat.numel(), expected)
        assert_close(terms["gan"], 0.5 * softplus(-disc(teacher.taps(x_hat_t, t, c, (1, 3)))).mean())
    critic = tmd.stage2_critic_loss(x_hat, x, teacher, fake, disc, c, noise_real=noise_real, **kw)
    real, wrong = disc(teacher.taps(x_t, t, c, (1, 3))), disc(teacher.taps(x_hat_t, t, c, (1, 3)))
    assert_close(critic["disc"], softplus(-real).mean() + softplus(wrong).mean())
    assert_close(critic["fake"], (fake(x_hat_t, t, c) - (noise - x_hat)).square().mean())


def test_generate_obeys_its_options(teacher, g):
    """Every ablation is one: rollout "last" gives x_hat another gradient, "none" and clean="printed" other samples."""
    student = perturbed(tmd.TMDStudent(teacher, 2), 0.1).double()
    x, c = batch(g)
    grids = {"outer_grid": tmd.make_grid(2, 1.0), "inner_grid": tmd.make_grid(3, 1.0)}

    def run(**kw):
        x_hat = tmd.generate(student, x, c, **grids, generator=torch.Generator().manual_seed(3), **kw)
        return x_hat.detach(), torch.autograd.grad(x_hat.square().sum(), student.gate)[0]

    full, last, none, printed = run(), run(rollout="last"), run(rollout="none"), run(clean="printed")
    assert_close(full[0], last[0], rtol=0, atol=0)
    assert (full[1] - last[1]).norm() > 0.01 * full[1].norm()
    assert (full[0] - none[0]).abs().max() > 0.01 and (full[0] - printed[0]).abs().max() > 0.01
    assert (run(field="printed")[0] - full[0]).abs().max() > 0.01 and (run(target="x")[0] - full[0]).abs().max() > 0.01


def test_critic_update_touches_only_the_critics(teacher, g):
    """Section 6: the fake score learns from denoising, the discriminator from the GAN; student and teacher rest."""
    student, fake, disc = stage2_parts(teacher)
    x, c = batch(g, 64)
    grids = {"outer_grid": tmd.make_grid(2, 10.0), "inner_grid": tmd.make_grid(2, 10.0)}
    x_hat = tmd.generate(student, x, c, **grids, generator=g)
    drawn = {"t": tmd.sample_times(x, 5.0, g), "noise": tmd.randn_like(x, g), "noise_real": tmd.randn_like(x, g)}
    terms = tmd.stage2_critic_loss(x_hat, x, teacher, fake, disc, c, **drawn, taps=(1, 3))
    terms["fake"].backward(retain_graph=True)
    assert grads(fake) and not grads(disc)
    terms["disc"].backward()
    assert grads(disc) and not grads(student) and not grads(teacher)


@pytest.mark.parametrize("rollout,reaches", [("full", True), ("last", False)])
def test_rollout_gradient_reaches_the_first_inner_step(teacher, rollout, reaches, g):
    """Section 6: all N steps carry gradient; the ablation's gradient stops before the last step."""
    student = perturbed(tmd.TMDStudent(teacher, 2)).double()
    x, c = batch(g)
    predict = tmd.transition(student, x, torch.full((16,), 0.9, dtype=F64), c)
    y_1 = torch.randn(16, 2, generator=g, dtype=F64).requires_grad_()
    outputs = []

    def watched(y_s, s, r):
        outputs.append(predict(y_s, s, r))
        return outputs[-1]

    y_hat = tmd.inner_flow(watched, y_1, tmd.make_grid(3, 10.0).double(), grad=rollout)
    y_hat.square().sum().backward()
    assert outputs[-1].requires_grad
    assert all(o.requires_grad == reaches for o in outputs[:-1])
    assert (y_1.grad is not None and y_1.grad.abs().max() > 0) == reaches


def test_rollout_none_jumps_once_from_the_real_path(teacher, g):
    """Ablation C3: without rollout the head is called once, from a noised real y; a perfect head returns the real x."""
    x, c = batch(g)
    seen = {}

    class Perfect:
        def features(self, x_t, t, c=None):
            seen["x_t"], seen["t"] = x_t, t

        def head(self, y_s, s, r, m):
            seen["calls"] = seen.get("calls", 0) + 1
            return (seen["x_t"] - x) / tmd.bcast(seen["t"], x)  # y = x_1 - x = (x_t - x) / t

    grids = {"outer_grid": tmd.make_grid(2, 10.0), "inner_grid": tmd.make_grid(4, 10.0)}
    x_hat = tmd.generate(Perfect(), x, c, **grids, generator=g, rollout="none")
    assert seen["calls"] == 1
    assert_close(x_hat, x)


def test_fake_score_loss_is_minimised_by_the_exact_velocity(g):
    """Eq. (2): on x_hat ~ N(0, 0.25), the denoising loss of the exact velocity is below any rescaling of it."""
    data = GaussianMixture([[0.0]], [0.5])
    x, noise = data.sample(100_000, g), torch.randn(100_000, 1, generator=g, dtype=F64)
    t = torch.rand(100_000, generator=g, dtype=F64) * 0.8 + 0.1
    losses = [tmd.denoising_loss(lambda x_t, t, c, k=k: k * data(x_t, t), x, noise, t) for k in (0.9, 1.0, 1.1)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_gan_losses():
    """Section 6: log-likelihoods averaged over heads; the generator's is non-saturating."""
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 3.0]])
    sigmoid = torch.sigmoid
    assert_close(tmd.gan_loss(fake, as_real=True), -sigmoid(fake).log().mean())
    assert_close(tmd.gan_loss(real, as_real=False), -(1 - sigmoid(real)).log().mean())


def test_taps_are_the_forward_s_hidden_states_and_stop_early(teacher, g):
    """Discriminator features: the states after the asked blocks, and no block after the last of them runs."""
    x, c = batch(g)
    t = torch.rand(16, generator=g, dtype=F64)
    ran, states = [], {}
    for i, block in enumerate(teacher.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: (ran.append(i), states.__setitem__(i, out))[0])
    features = teacher.taps(x, t, c, (0, 2))
    assert ran == [0, 1, 2]
    teacher(x, t, c)
    assert_close(features, [states[0], states[2]])


# -- bad input --------------------------------------------------------------------------------------------------------

LABELS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: tmd.StudentConfig(M=0), "M is 0"),
        (lambda: tmd.StudentConfig(N=0), "N is 0"),
        (lambda: tmd.StudentConfig(field="other"), "field"),
        (lambda: tmd.StudentConfig(M=200), "fewer steps"),
        (lambda: tmd.Stage1Config(derivative="x"), "derivative"),
        (lambda: tmd.Stage2Config(normalizer="x"), "normalizer"),
        (lambda: tmd.Stage2Config(student_every=1), "student_every"),
        (lambda: tmd.shift(0.5, 0.0), "positive"),
        (lambda: tmd.down(torch.tensor([0, 0.5, 0.4])), "increase"),
        (lambda: tmd.down(torch.tensor([0.1, 0.5])), "increase"),
        (lambda: tmd.interpolate(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0.5, 1.5])), "[0, 1]"),
        (lambda: tmd.interpolate(torch.zeros(2, 2), torch.zeros(2, 3), torch.tensor([0.5, 0.5])), "disagree"),
        (lambda: tmd.interpolate(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0.5])), "one time a sample"),
        (lambda: tmd.TMDStudent(PlanarNet(2, 16, 3), 3), "1 <= H < L"),
        (lambda: tmd.TMDStudent(PlanarNet(2, 16, 3), 0), "1 <= H < L"),
        (lambda: PlanarNet(2, 16, 3)(torch.zeros(4, 3), torch.zeros(4)), "(B, 2)"),
        (lambda: PlanarNet(2, 16, 3)(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4)), "no classes"),
        (lambda: PlanarNet(2, 16, 3).taps(torch.zeros(4, 2), torch.zeros(4), None, (3,)), "blocks 0 to 2"),
        (lambda: tmd.sample_teacher(None, torch.zeros(4, 2), grid=tmd.make_grid(2, 1.0), method="rk4"), "method"),
        (lambda: tmd.guided(PlanarNet(2, 16, 3, 2), torch.zeros(4, 2), torch.zeros(4), LABELS, None, 2.0), "c_neg"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    """Each mistake is a ValueError that says what is wrong, in one line."""
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200
