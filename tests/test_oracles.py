"""The method against closed forms: exact teachers, exact posteriors, exact inner flows (float64)."""

import math

import pytest
import torch
from torch.testing import assert_close

import tmd_minimal as tmd
from toys.oracles import ExactStudent, GaussianInnerFlow, GaussianMixture

F64 = torch.float64
MIXTURE = GaussianMixture([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]], [0.3, 0.5, 0.2], [0.5, 0.3, 0.2])


def moments(x):
    """Mean, covariance and mean fourth power: what two samples are compared by."""
    return torch.cat([x.mean(0), torch.cov(x.T).flatten(), x.pow(4).mean(0)])


def spread(x, parts=20):
    """Standard error of `moments`, from disjoint parts."""
    return torch.stack([moments(p) for p in x.chunk(parts)]).std(0) / parts**0.5


def agree(a, b, sigmas=5.0):
    """Moments of two samples agree within `sigmas` of their own sampling error."""
    gap = (moments(a) - moments(b)).abs()
    error = (spread(a).square() + spread(b).square()).sqrt()
    assert (gap < sigmas * error).all(), f"gap in standard errors: {(gap / error).tolist()}"


def test_exact_velocity_is_the_conditional_mean(g):
    """Eq. (2): the mixture's velocity is E[x_1 - x | x_t], checked by regression on functions of x_t."""
    x = MIXTURE.sample(400_000, g)
    noise, t = torch.randn(x.shape, generator=g, dtype=F64), torch.full((len(x),), 0.6, dtype=F64)
    x_t = tmd.interpolate(x, noise, t)
    residual = noise - x - MIXTURE(x_t, t)
    for f in (torch.ones_like(x_t), x_t, x_t.square(), x_t.sin()):
        products = residual * f
        assert (products.mean(0).abs() < 5 * products.std(0) / len(x) ** 0.5).all()


def test_velocity_transports_the_marginals(g):
    """Heun on the exact velocity ends in the data distribution."""
    grid = tmd.make_grid(100, 1.0).double()
    x = tmd.sample_teacher(MIXTURE, torch.randn(40_000, 2, generator=g, dtype=F64), grid=grid, method="heun")
    agree(x, MIXTURE.sample(40_000, g))


def test_heun_is_second_order_and_euler_first():
    """Halving the step divides the error by about 4 (Heun) and 2 (Euler)."""
    x_1 = torch.linspace(-2, 2, 41, dtype=F64)[:, None].repeat(1, 2)
    data = GaussianMixture([[0.5, -0.5]], [0.5])
    grid = lambda steps: torch.linspace(0, 0.999, steps + 1, dtype=F64)
    exact = tmd.sample_teacher(data, x_1, grid=grid(4096), method="heun")
    for method, order in (("euler", 1), ("heun", 2)):
        ends = [tmd.sample_teacher(data, x_1, grid=grid(steps), method=method) for steps in (64, 128)]
        error = [(end - exact).norm() for end in ends]
        assert abs(math.log2(error[0] / error[1]) - order) < 0.25


@pytest.mark.parametrize("outer", ["deterministic", "renoised"])
@pytest.mark.parametrize("grid", [[0, 0.999], [0, 0.5, 0.999], [0, 0.2, 0.3, 0.9, 0.999]])
def test_algorithm_1_with_exact_posteriors_keeps_every_marginal(grid, outer, g):
    """Eq. (4), (18), (19): with y ~ p(y | x_t) every x_{t_i} has the right law, on any grid, in both transitions."""
    n, grid = 60_000, torch.tensor(grid, dtype=F64)
    start = tmd.interpolate(MIXTURE.sample(n, g), torch.randn(n, 2, generator=g, dtype=F64), grid[-1].expand(n))
    trace = []
    x = tmd.sample(ExactStudent(MIXTURE, g), start, outer_grid=grid, inner_grid=tmd.make_grid(1, 1.0).double(),
                   outer=outer, generator=g, trace=trace)  # fmt: skip
    agree(x, MIXTURE.sample(n, g))
    for row in trace:
        t = torch.full((n,), row["t"], dtype=F64)
        agree(row["x_t"], tmd.interpolate(MIXTURE.sample(n, g), torch.randn(n, 2, generator=g, dtype=F64), t))


def test_flow_matching_loses_covariance_that_transition_matching_keeps(g):
    """C0: with two steps, the mean velocity shrinks the data's spread; a sample of y keeps it."""
    data, grid, n = GaussianMixture([[0.0, 0.0]], [1.0]), tmd.make_grid(2, 1.0).double(), 50_000
    x_1 = torch.randn(n, 2, generator=g, dtype=F64)
    flow = tmd.sample_teacher(data, x_1, grid=grid).std()
    inner = tmd.make_grid(1, 1.0).double()
    matched = tmd.sample(ExactStudent(data, g), x_1, outer_grid=grid, inner_grid=inner, generator=g).std()
    assert flow < 0.55 and abs(matched - 1) < 0.01


# -- trap 2: Eq. (14) as printed is not a velocity field ---------------------------------------------------------------

STD_TABLE = {1.0: (0.623, 0.493), 0.5: (0.244, 0.191), 2.0: (1.489, 1.213)}  # sigma: (N = 1, N to infinity), as printed


def rollout_std(sigma, field, grid):
    """Std of the rollout from y_1 ~ N(0, 1): the flow is linear, so it is |y_0| for y_1 = 1."""
    oracle = GaussianInnerFlow(sigma, field)
    return tmd.inner_flow(lambda y, s, r: oracle.head(y, s, r), torch.ones(1, 1, dtype=F64), grid, field).abs().item()


@pytest.mark.parametrize("sigma", STD_TABLE)
def test_rollout_std_as_printed_is_too_small(sigma):
    """Eq. (14) as printed: at its exact optimum for std 1 the rollout has std 0.623 at N = 1, in the limit 0.493."""
    one = torch.tensor([0, 1.0], dtype=F64)
    many = torch.linspace(0, 1, 2001, dtype=F64)
    assert rollout_std(sigma, "printed", one) == pytest.approx(STD_TABLE[sigma][0], abs=1e-3)
    assert rollout_std(sigma, "printed", many) == pytest.approx(STD_TABLE[sigma][1], abs=1e-3)


@pytest.mark.parametrize("sigma", STD_TABLE)
@pytest.mark.parametrize("N", [1, 2, 4, 50])
def test_rollout_std_consistent_is_exact(sigma, N):
    """Eq. (14) consistent: the exact average velocity ends at std sigma for any N (from s = 1)."""
    assert rollout_std(sigma, "consistent", torch.linspace(0, 1, N + 1, dtype=F64)) == pytest.approx(sigma, abs=1e-9)


def test_printed_rollout_is_a_weighted_mean_of_head_outputs(g):
    """Trap 2: y_0 = (1 - s_N) y_1 + sum_j (s_j - s_{j-1}) head_j, whatever the head."""
    grid, outputs = tmd.make_grid(3, 10.0).double(), []

    def predict(y_s, s, r):
        outputs.append(torch.randn(y_s.shape, generator=g, dtype=F64))
        return outputs[-1]

    y_1 = torch.randn(5, 2, generator=g, dtype=F64)
    y_0 = tmd.inner_flow(predict, y_1, grid, "printed")
    expected = (1 - grid[-1]) * y_1 + sum(w * h for w, h in zip(grid.diff().flip(0), outputs))
    assert_close(y_0, expected)


def test_fields_agree_on_training_pairs(g):
    """Eq. (14): on y_s = (1-s) y + s y_1 with head = y, both readings give v = y_1 - y."""
    y, y_1 = torch.randn(7, 3, generator=g, dtype=F64), torch.randn(7, 3, generator=g, dtype=F64)
    s = torch.rand(7, generator=g, dtype=F64) * 0.9 + 0.05
    y_s = tmd.interpolate(y, y_1, s)
    for field in ("consistent", "printed"):
        assert_close(tmd.inner_velocity(y, y_s, s, y_1, field), y_1 - y)


# -- trap 1: the sign of Eq. (13) -------------------------------------------------------------------------------------


def test_inner_step_goes_toward_data(g):
    """Eq. (13): with the true velocity y_1 - y, the rollout lands on y, for any grid; a plus sign would not."""
    y, y_1 = torch.randn(4, 2, 3, generator=g, dtype=F64), torch.randn(4, 2, 3, generator=g, dtype=F64)
    y_1_at_top = tmd.interpolate(y, y_1, torch.full((4,), 0.999, dtype=F64))
    for N in (1, 2, 5):
        assert_close(tmd.inner_flow(lambda *_: y, y_1_at_top, tmd.make_grid(N, 10.0).double()), y, atol=1e-12, rtol=0)


# -- trap 3: Eq. (15) as printed leaks x_1 ----------------------------------------------------------------------------


def test_printed_clean_estimate_leaks_the_real_data():
    """Eq. (15): at fixed x_t and y_hat, x_1 - y_hat moves by -(1-t)/t with the real x; x_t - t y_hat (Eq. 17) rests."""
    x = torch.tensor([[0.0], [1.0]], dtype=F64)
    for t_value, slope in ((0.999, -0.001 / 0.999), (1 / 1.1, -0.1), (0.5, -1.0)):
        t = torch.full((2,), t_value, dtype=F64)
        x_t, y_hat = torch.full((2, 1), 0.3, dtype=F64), torch.full((2, 1), 0.7, dtype=F64)
        x_1 = (x_t - (1 - t_value) * x) / t_value
        printed = tmd.clean_estimate(y_hat, x_t, t, clean="printed", x_1=x_1)
        consistent = tmd.clean_estimate(y_hat, x_t, t, clean="consistent")
        assert (printed[1] - printed[0]).item() == pytest.approx(slope, abs=1e-9)
        assert (consistent[1] - consistent[0]).item() == 0.0


def test_generate_and_sampling_end_in_the_same_place(g):
    """Eq. (15) consistent is what Algorithm 1 computes: stage 2 trains the transition that sampling makes."""
    data = GaussianMixture([[0.3, -0.2]], [0.8])
    student = GaussianInnerFlow(0.7)
    grid, inner = torch.tensor([0, 0.999], dtype=F64), tmd.make_grid(3, 10.0).double()
    x = data.sample(6, g)
    state = g.get_state()
    x_hat = tmd.generate(student, x, outer_grid=grid, inner_grid=inner, generator=g)
    g.set_state(state)
    t, x_1 = tmd.sample_outer(x, grid, g), tmd.randn_like(x, g)
    x_t = tmd.interpolate(x, x_1, t)
    assert_close(tmd.sample(student, x_t, outer_grid=grid, inner_grid=inner, generator=g), x_hat)


# -- trap 9: deterministic outer transitions need a posterior sample --------------------------------------------------


@pytest.mark.parametrize("t,t_next", [(0.999, 0.5), (0.999, 0.909)])
def test_deterministic_outer_step_is_off_when_only_the_marginal_matches(t, t_next, g):
    """With the right marginal but the wrong coupling, Eq. (18) misses the next marginal and Eq. (19) hits it.

    x_hat = a x_t has the data's std. Eq. (18) gives std (t'/t) std_t + (1 - t'/t) sigma, Eq. (19) std_t'.
    """
    n, sigma = 200_000, 0.5
    std = lambda q: math.sqrt((1 - q) ** 2 * sigma**2 + q**2)
    x_t = std(t) * torch.randn(n, 1, generator=g, dtype=F64)
    x_hat = x_t * sigma / std(t)  # right marginal, wrong coupling
    times = [torch.full((n,), q, dtype=F64) for q in (t, t_next)]
    off = tmd.outer_step(x_t, x_hat, *times, "deterministic").std().item()
    exact = tmd.outer_step(x_t, x_hat, *times, "renoised", g).std().item()
    assert off == pytest.approx(t_next / t * std(t) + (1 - t_next / t) * sigma, rel=5e-3)
    assert exact == pytest.approx(std(t_next), rel=5e-3)
    assert off / std(t_next) > (1.3 if t_next == 0.5 else 1.03)  # large on a spread grid, small near t = 1


# -- VSD --------------------------------------------------------------------------------------------------------------


def vsd_gradient(fake, teacher, x_hat, t, noise, normalizer):
    """Gradient on x_hat (n, d) of vsd_loss with exact scores, times n d, so that it is per sample."""
    x_hat = x_hat.clone().requires_grad_()
    t = torch.full((len(x_hat),), t, dtype=F64)
    x_t = tmd.interpolate(x_hat, noise, t).detach()
    g_fake, g_teacher = (tmd.velocity_to_clean(x_t, t, net(x_t, t)) for net in (fake, teacher))
    tmd.vsd_loss(x_hat, g_fake, g_teacher, normalizer).backward()
    return x_hat.grad * x_hat.numel()


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_vsd_gradient_is_the_kl_gradient_between_gaussians(t, g):
    """Eq. (11): E[g_fake - g_teacher] is t^2/(1-t)^2 dKL(fake_t || teacher_t)/dmean; times x_hat's noise, d/dstd."""
    (mu, sigma), (mu_t, sigma_t) = (0.7, 0.6), (-0.3, 1.0)
    fake, teacher = GaussianMixture([[mu]], [sigma]), GaussianMixture([[mu_t]], [sigma_t])
    n = 200_000
    z = torch.randn(n, 1, generator=g, dtype=F64)
    gradient = vsd_gradient(fake, teacher, mu + sigma * z, t, torch.randn(n, 1, generator=g, dtype=F64), "none")
    kl_mean = torch.tensor([mu, sigma], dtype=F64, requires_grad=True)
    var, var_t = ((1 - t) ** 2 * q**2 + t**2 for q in (kl_mean[1], sigma_t))
    kl = 0.5 * (var / var_t + ((1 - t) * (kl_mean[0] - mu_t)) ** 2 / var_t - 1 - torch.log(var / var_t))
    kl.backward()
    expected = t**2 / (1 - t) ** 2 * kl_mean.grad
    got = torch.stack([gradient.mean(), (gradient * z).mean()])  # d x_hat / d mean = 1, d x_hat / d std = z
    error = torch.stack([gradient.std(), (gradient * z).std()]) / n**0.5
    assert ((got - expected).abs() < 5 * error).all()
    for normalizer in ("dmd", "paper"):  # a per-sample weight keeps the direction
        weighted = vsd_gradient(fake, teacher, mu + sigma * z, t, torch.randn(n, 1, generator=g, dtype=F64), normalizer)
        assert weighted.mean() * expected[0] > 0


def test_vsd_gradient_vanishes_when_they_agree(g):
    """Eq. (11): no gradient where fake and teacher agree; the paper's normaliser blows up any other gap (trap 5)."""
    data, almost = GaussianMixture([[0.5]], [0.7]), GaussianMixture([[0.5 + 1e-4]], [0.7])
    x_hat, noise = data.sample(1000, g), torch.randn(1000, 1, generator=g, dtype=F64)
    for normalizer in ("none", "dmd", "paper"):
        assert vsd_gradient(data, data, x_hat, 0.5, noise, normalizer).abs().max() == 0
    assert vsd_gradient(almost, data, x_hat, 0.5, noise, "dmd").abs().median() < 1e-3
    assert vsd_gradient(almost, data, x_hat, 0.5, noise, "paper").abs().median() == pytest.approx(1.0)
