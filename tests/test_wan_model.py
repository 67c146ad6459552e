"""Wan as a network of tmd_minimal: the stock transformer in parts, its student, its discriminator."""

import copy

import pytest
import torch

import tmd_minimal as tmd

pytest.importorskip("diffusers")
from wan_scale.config import WanStudentConfig
from wan_scale.model import WanDiscriminator, WanNetwork, feature_channels, load_transformer
from wan_scale.tiny import make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("wan") / "tiny")


@pytest.fixture
def net(folder):
    return WanNetwork(load_transformer(folder)).eval()


@pytest.fixture
def batch(g):
    x, c = torch.randn(2, 16, 3, 8, 12, generator=g), torch.randn(2, 20, 32, generator=g)
    return x, torch.tensor([0.3, 0.999], dtype=torch.float64), c


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_is_the_stock_forward(folder, batch, dtype):
    """Backbone blocks, then head blocks and output: bit for bit what diffusers' own forward gives, at every H and in
    both precisions.
    """
    transformer = load_transformer(folder, dtype)
    net, (x, t, c) = WanNetwork(transformer), batch
    stock = transformer(x.to(dtype), 1000 * t, c.to(dtype), return_dict=False)[0].float()
    assert torch.equal(net(x, t, c), stock)
    for H in range(1, 4):
        e = net.modulate(net.time(t), net.context(c, x))
        assert torch.equal(net.output(net.run(net.run(net.embed(x), e, stop=-H), e, start=-H), e), stock)


def test_bf16_keeps_times_and_tables_in_fp32(folder):
    """diffusers loads bf16 weights with the time embedding, the modulation tables and the norms in float32, and we keep
    them so.
    """
    net = WanNetwork(load_transformer(folder, torch.bfloat16))
    assert net.transformer.scale_shift_table.dtype == net.blocks[0].scale_shift_table.dtype == torch.float32
    assert net.patch.weight.dtype == torch.bfloat16
    time = net.time
    assert time.mlp[0].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert time(torch.tensor([0.5])).dtype == torch.float32


@pytest.mark.parametrize("H", [1, 2, 3])
def test_student_starts_as_the_teacher(net, batch, H):
    """At s = t the new student is the teacher: exactly with the gate closed, within a few percent at the gate's start
    of 0.05.
    """
    x, t, c = batch
    student, wanted = tmd.TMDStudent(net, H), net(x, t, c)
    m = student.features(x, t, c)
    assert ((student.head(x, t, t, m) - wanted).norm() / wanted.norm()) < 0.05
    torch.nn.init.constant_(student.gate, -40.0)
    torch.testing.assert_close(student.head(x, t, t, m), wanted, rtol=1e-5, atol=1e-6)
    concat = tmd.TMDStudent(net, H, "concat")
    assert ((concat.head(x, t, t, concat.features(x, t, c)) - wanted).norm() / wanted.norm()) < 0.3


def test_checkpointing_changes_no_gradient(net, batch, g):
    """Recomputing every block in the backward pass gives the same gradients, through N head calls."""
    x, t, c = batch
    grads = []
    for mode in ("none", "selective", "full"):
        torch.manual_seed(0)
        student = tmd.TMDStudent(net, 2)
        student.load_state_dict({k: v + 0.01 * torch.randn_like(v) for k, v in student.state_dict().items()})
        student.net.checkpointing = mode
        predict = tmd.transition(student, x, t, c)
        tmd.inner_flow(predict, torch.ones_like(x), tmd.make_grid(3, 10.0)).square().mean().backward()
        grads.append({name: p.grad for name, p in student.named_parameters()})
    for name, grad in grads[0].items():
        for other in grads[1:]:
            torch.testing.assert_close(other[name], grad, rtol=1e-5, atol=1e-8, msg=name)
        assert grad.abs().sum() > 0, name


def test_calls_of_one_sample(net, batch, monkeypatch):
    """M outer transitions of N inner steps: text embedded M times, backbone blocks run M times, head blocks M N times,
    rope made once.
    """
    x, _, c = batch
    student, M, N, H = tmd.TMDStudent(net, 1), 2, 3, 1
    counts = dict.fromkeys(("text", "backbone", "head", "rope"), 0)

    def count(name):
        return lambda *args: counts.__setitem__(name, counts[name] + 1)

    t = student.net.transformer
    t.condition_embedder.text_embedder.register_forward_hook(count("text"))
    t.blocks[0].register_forward_hook(count("backbone"))
    t.blocks[-1].register_forward_hook(count("head"))
    t.rope.register_forward_hook(count("rope"))
    how = WanStudentConfig(M=M, N=N, H=H)
    tmd.sample(student, x, c, outer_grid=how.outer_grid, inner_grid=how.inner_grid)
    assert counts == {"text": M, "backbone": M, "head": M * N, "rope": 1}


def test_taps_stop_early_and_are_pictures(net, batch):
    """Features of a block are the hidden states after it, laid out as (B, D / 4, T, H, W); later blocks do not run."""
    x, t, c = batch
    ran, seen = [], []
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda m, a, out, i=i: (ran.append(i), seen.append(out)) and None)
    features = net.taps(x, t, c, (0, 2))
    assert ran == [0, 1, 2] and [tuple(f.shape) for f in features] == [(2, 12, 3, 8, 12)] * 2
    token = seen[2][1].unflatten(0, (3, 4, 6))[2, 1, 5]  # clip 1, frame 2, patch row 1, column 5
    torch.testing.assert_close(features[1][1, :, 2, 2:4, 10:12].flatten(), token)


def test_finite_difference_in_fp32(net, batch):
    """du/ds by differences is right to 0.1 % of a float64 network's, inside bf16 autocast too; in bf16 itself it would
    be rounding.

    Wan's fastest sinusoid turns 5 radians in the paper's step of 0.005, so that difference is a smoothed derivative; at
    a hundredth of the step it meets exact forward mode.
    """
    x, t, c = batch
    student, s, v = tmd.TMDStudent(net, 2), torch.tensor([0.4, 0.7], dtype=torch.float64), torch.ones_like(x)

    def derivative(student, how="fd", step=0.005):
        x_, c_, v_ = (a.to(next(student.parameters()).dtype) for a in (x, c, v))
        predict = tmd.transition(student, x_, t, c_)
        return tmd.total_derivative(lambda y, s: predict(y, s, torch.full_like(s, 0.1)), x_, s, v_, how, step)

    apart = lambda a, b: ((a - b).norm() / b.norm()).item()
    ours, exact = derivative(student), derivative(copy.deepcopy(student).double()).float()
    assert apart(ours, exact) < 1e-3
    assert apart(derivative(student, step=2e-5), derivative(student, "jvp")) < 0.05
    predict = tmd.transition(student, x, t, c)
    f = lambda y, s: predict(y, s, torch.full_like(s, 0.1))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert torch.equal(tmd.total_derivative(f, x, s, v), ours)
        inside = tmd.transition(student, x, t, c)  # a backbone in bf16 hands the head what float32 can go on with
        assert apart(tmd.total_derivative(lambda y, s: inside(y, s, torch.full_like(s, 0.1)), x, s, v), exact) < 0.05
        rounded = (f(x + 0.005 * v, s + 0.005) - f(x - 0.005 * v, s - 0.005)) / 0.01
    assert apart(rounded, exact) > 10 * apart(ours, exact)


def test_times_are_float64_until_the_embedding(net):
    """Grids and every time drawn are float64, and Wan's sinusoids see 1000 t to float32's last bit."""
    how, x = WanStudentConfig(M=2, N=4, H=2), torch.zeros(4, 16, 1, 2, 2)
    draws = tmd.stage1_draw(x, how.outer_grid, how.inner_grid)
    assert {draws[key].dtype for key in "tsr"} == {torch.float64}
    t = torch.tensor([0.1234567890123], dtype=torch.float64)
    torch.testing.assert_close(net.time(t), net.time.mlp(net.time.sinusoids(t * 1000)), rtol=0, atol=0)


def test_discriminator_has_the_papers_size():
    """67.9 M parameters on three taps of 1.3B's 384 channels (the paper: 68 M), 171 M at 14B's width (the paper: 172
    M); a logit a head.
    """
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in WanDiscriminator(c, w, 3).parameters()) for c, w in ((384, 384), (1280, 608))]
    assert round(sizes[0] / 1e6, 1) == 67.9 and 170e6 < sizes[1] < 173e6
    net = WanDiscriminator(12, 8, 2, hidden=16)
    features = [torch.randn(3, 12, 3, 20, 18, requires_grad=True) for _ in range(2)]
    logits = net(features)
    logits[:, 1].sum().backward()
    assert logits.shape == (3, 2) and features[0].grad.abs().sum() == 0 and features[1].grad.abs().sum() > 0


def copying(net, features):
    """The discriminator as it reads on paper: every feature in the weights' precision, then every branch of its head.

    An oracle, written out once more.
    """
    weight, joined = net.logits[0][0].weight, []
    for head, h in zip(net.heads, features):
        h = h.to(weight.dtype)
        joined.append(torch.cat([branch(h) for branch in head], -1))
    return torch.cat([logit(z) for logit, z in zip(net.logits, joined)], -1)


def of_discriminator(net, forward, features):
    """[logits, gradients of weights and of features], bytes that a forward keeps beside its features."""
    net.zero_grad()
    features, saved = [h.detach().clone().requires_grad_(h.requires_grad) for h in features], {}

    def seen(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    given = {h.untyped_storage().data_ptr() for h in features}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
            logits = forward(features)
        (logits * torch.arange(1.0, 1 + logits.numel()).view_as(logits)).sum().backward()
    kept = sum(size for place, size in saved.items() if place not in given)
    return [logits, *(p.grad for p in net.parameters()), *(h.grad for h in features if h.requires_grad)], kept


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_discriminator_keeps_no_second_copy_of_features(inputs, lean, g):
    """In bf16 autocast the branches read bf16 features where they lie: logits and gradients are, to the bit, those of
    float32 copies, in the critics' update and in the student's (`inputs`); with checkpointing nothing as large as a
    feature is kept beside it, without it no copy of it.
    """
    net = WanDiscriminator(8, 4, 2, hidden=16, checkpointing=lean)
    features = [torch.randn(2, 8, 4, 12, 16, generator=g).bfloat16().requires_grad_(inputs) for _ in range(2)]
    ours, kept = of_discriminator(net, net, features)
    wanted, before = of_discriminator(net, lambda h: copying(net, h), features)
    assert len(ours) == len(wanted) and all(torch.equal(a, b) for a, b in zip(ours, wanted))
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    one = features[0].nbytes
    if lean:  # before: both features in float32
        assert before >= 2 * 2 * one and kept < one / 2
    else:  # before: each of five branches had its own bf16 copy of its feature
        assert before - kept == 2 * 5 * one


@pytest.mark.parametrize("shape", [(1, 16, 3, 7, 8), (1, 4, 3, 8, 8), (1, 16, 8, 8)])
def test_latents_that_do_not_fit(net, shape):
    """Odd sizes, another channel count and a missing axis are named."""
    with pytest.raises(ValueError, match="do not fit 16 channels in patches"):
        net(torch.zeros(shape), torch.tensor([0.5]), torch.zeros(1, 3, 32))


def test_what_is_not_text_to_video_is_refused(folder, net):
    """No text, and an image-to-video checkpoint, get a sentence."""
    with pytest.raises(ValueError, match="needs text embeddings"):
        net(torch.zeros(1, 16, 1, 2, 2), torch.tensor([0.5]))
    other = copy.deepcopy(net.transformer)
    other.register_to_config(image_dim=8)
    with pytest.raises(ValueError, match="image-to-video"):
        WanNetwork(other)
    assert feature_channels(net) == 12
