"""What makes Wan fast changes no result: attention, activation checkpointing, compiled blocks, kept prompts, graphs."""

from functools import partial
from unittest.mock import Mock

import pytest
import torch

import tmd_minimal as tmd

pytest.importorskip("diffusers")
from counting import Counting
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.utils._python_dispatch import TorchDispatchMode

from wan_scale import speed
from wan_scale.config import WanStudentConfig
from wan_scale.model import WanNetwork, load_transformer
from wan_scale.tiny import make_tiny
from wan_scale.training import lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("wan") / "tiny")


@pytest.fixture
def net(folder):
    return WanNetwork(load_transformer(folder))


@pytest.fixture
def batch(g):
    x, c = torch.randn(2, 16, 3, 8, 12, generator=g), torch.randn(2, 20, 32, generator=g)
    return x, torch.tensor([0.3, 0.999], dtype=torch.float64), c


class Seen(TorchDispatchMode):
    """Counts the attention operations that are computed."""

    attended = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.attended += "attention" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def rollout(student, batch, N=3):
    x, t, c = batch
    return tmd.inner_flow(tmd.transition(student, x, t, c), torch.ones_like(x), tmd.make_grid(N, 10.0))


def test_float32_calls_take_the_native_backend(net, batch, monkeypatch):
    """Half precision goes to the backend that was chosen, float32 (the finite difference) to native, whatever autocast
    the rest runs in.
    """
    asked = []
    stock = speed.WanAttnProcessor.__call__
    monkeypatch.setattr(
        speed.WanAttnProcessor,
        "__call__",
        lambda self, *a, **k: (asked.append(self._attention_backend), stock(self, *a, **k))[1],
    )
    monkeypatch.setitem(speed.BACKENDS, "flash", "_native_math")  # a backend that a CPU has
    speed.prepare(net, attn="flash")
    x, t, c = batch
    with torch.no_grad():
        net(x, t, c)
        assert set(asked) == {AttentionBackendName.NATIVE}
        asked.clear()
        with torch.autocast("cpu", torch.bfloat16):
            net(x, t, c)
            assert set(asked) == {AttentionBackendName._NATIVE_MATH}
            asked.clear()
            tmd.total_derivative(lambda y, s: net(y, s, c), x, t, torch.ones_like(x))
            assert set(asked) == {AttentionBackendName.NATIVE}


def test_backends_are_timed_and_the_fastest_is_taken():
    """A backend that does not run here is told in words and not chosen; where none runs it is an error."""
    times = speed.attention_times(2, 16, 64, torch.device("cpu"), torch.float32)
    assert (
        set(times) == {"native", "cudnn", "flash", "flex"} and times["native"] > 0 and isinstance(times["cudnn"], str)
    )
    assert speed.fastest({"native": 2.0, "cudnn": 1.0, "flash": "RuntimeError: no"}) == "cudnn"
    with pytest.raises(RuntimeError, match="no attention backend runs here"):
        speed.fastest({"flash": "RuntimeError: no"})


@pytest.mark.parametrize(("mode", "again"), [("none", 0), ("selective", 0), ("full", 1)])
def test_selective_checkpointing_leaves_attention_out(net, batch, mode, again):
    """Every block has two attentions: computed once with "none" and "selective", once more in the backward pass with
    "full".
    """
    student = tmd.TMDStudent(speed.prepare(net, checkpointing=mode), 2)
    with Seen() as seen:
        y = rollout(student, batch, N=2)
        forward = seen.attended
        y.square().mean().backward()
    blocks = len(net.blocks) - 2 + 2 * 2
    assert forward == 2 * blocks and seen.attended - forward == again * forward


@pytest.mark.parametrize("N", [1, 2])
def test_fusion_and_output_are_computed_again(net, g, N):
    """With activation checkpointing a head evaluation keeps, of its fusion and output layer, less than half of what it
    would: the same loss and gradients, bit for bit, in bf16 autocast.
    """
    x, c = torch.randn(1, 16, 5, 32, 32, generator=g), torch.randn(1, 20, 32, generator=g)
    numbers, found = N * 5 * 16 * 16 * 48, {}
    for again in (False, True):
        torch.manual_seed(0)
        student = speed.prepare(tmd.TMDStudent(net, 2), checkpointing="full")
        if not again:
            student.net.outside, student.fuse.forward = "none", partial(type(student.fuse).forward, student.fuse)
        saved, own = {}, {p.data_ptr() for p in student.parameters()}

        def keep(t, saved=saved, own=own):
            if t.data_ptr() not in own:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = rollout(student, (x, torch.tensor([0.6], dtype=torch.float64), c), N).square().mean()
        kept = sum(storage.nbytes() for storage in saved.values()) / numbers
        loss.backward()
        found[again] = kept, loss.detach(), {name: p.grad for name, p in student.named_parameters()}
    (before, loss, grads), (after, again, others) = found[False], found[True]
    assert torch.equal(loss, again) and all(torch.equal(grad, others[name]) for name, grad in grads.items())
    assert before - after > 0.5 * 38  # of plan's bytes a number


def compared(net, batch, mode: str):
    """Loss and every gradient of a rollout: of eager blocks, of compiled ones."""
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        student = tmd.TMDStudent(net, 2)  # a deep copy: its blocks must not be those of `net`
        student.load_state_dict({k: v + 0.01 * torch.randn_like(v) for k, v in student.state_dict().items()})
        speed.prepare(student.net, compiled=on, checkpointing=mode)
        loss = rollout(student, batch).square().mean()
        loss.backward()
        found.append((loss, {name: p.grad for name, p in student.named_parameters()}))
    (loss, grads), (compiled_loss, compiled_grads) = found
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(compiled_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize(("mode", "again"), [("none", 0), ("selective", 0), ("full", 2)])
def test_a_block_is_one_graph(net, batch, mode, again):
    """One compilation serves all blocks of backbone and head, cut nowhere; its backward pass has the attentions that
    the mode asks for.
    """
    with Counting() as seen:
        compared(net, batch, mode)
        assert seen.forward == [2] and seen.backward == [again] and not seen.breaks


def test_a_block_is_one_graph_in_sampling(net, batch):
    """With the keys and values of a prompt kept, too; and the sample is the eager one."""
    x, _, c = batch
    student, how = tmd.TMDStudent(net, 1), WanStudentConfig(M=2, N=2, H=1)
    grids = {"outer_grid": how.outer_grid, "inner_grid": how.inner_grid}
    sample = lambda: tmd.sample(student, x, c, **grids, generator=torch.Generator().manual_seed(0))
    wanted = sample()
    with Counting() as seen, torch.no_grad():
        speed.prepare(student.net, compiled=True, frozen=True)
        torch.testing.assert_close(sample(), wanted, rtol=1e-5, atol=1e-5)
        assert seen.forward == [2] and not seen.breaks


def test_adapters_are_compiled(net, batch):
    """Teacher and fake score on one base, blocks with one adapter and with two: a graph for each, cut nowhere; outputs
    as eager ones.
    """
    x, t, c = batch
    base = lora.adapt(net, 4, 10.0, {"student": 2, "fake": 4})
    roles = [lora.Role(base), lora.Role(base, "fake")]
    with torch.no_grad():
        for p in base.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        wanted = [role(x, t, c) for role in roles]
        assert (wanted[0] - wanted[1]).abs().max() > 1e-4
        with Counting() as seen:
            for role in roles:
                speed.prepare(role, compiled=True)
            for role, output in zip(roles, wanted):
                torch.testing.assert_close(role(x, t, c), output, rtol=1e-5, atol=1e-5)
            assert seen.forward == [2] * 4 and not seen.breaks


@pytest.mark.slow
def test_compiled_by_inductor(net, batch):
    """The compiler that GPUs use gives the same loss and gradients."""
    torch._dynamo.reset()
    speed.compiled_forward = None
    compared(net, batch, "selective")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_a_frozen_network_keeps_what_it_made_of_a_prompt(net, batch):
    """Over M transitions of N inner steps: the same sample bit for bit, text and every block's keys made once; not for
    another prompt.
    """
    x, _, c = batch
    student, how = tmd.TMDStudent(net, 1), WanStudentConfig(M=2, N=3, H=1)
    sample = lambda c: tmd.sample(
        student, x, c, outer_grid=how.outer_grid, inner_grid=how.inner_grid, generator=torch.Generator().manual_seed(0)
    )
    other = c.flip(0)
    wanted, wanted_other = sample(c), sample(other)
    speed.prepare(student.net, frozen=True)
    made, t = [], student.net.transformer
    for block in t.blocks:
        block.attn2.to_k.register_forward_hook(lambda *a: made.append("keys"))
    t.condition_embedder.text_embedder.register_forward_hook(lambda *a: made.append("text"))
    assert torch.equal(sample(c), wanted)
    assert made.count("text") == 1 and made.count("keys") == len(t.blocks)
    assert torch.equal(sample(other), wanted_other) and torch.equal(sample(c), wanted)


class Replayed:
    """Stands for a CUDA graph of the head: computes it again from the tensors that it was recorded with."""

    def __init__(self, work, output):
        self.work, self.output = work, output

    def replay(self):
        self.output.copy_(self.work())


def test_graphed_head_is_the_head(net, batch, monkeypatch, capsys):
    """Every call copies all that a replay reads, and hands out a tensor of its own: other prompts, times and N, as
    without a graph.

    The graph is a stand-in (a real one: tests/test_cuda.py); on a CPU nothing is recorded.
    """
    x, _, c = batch
    student = tmd.TMDStudent(net, 2)
    speed.prepare(student.net, frozen=True)
    plain, graphed, recorded = speed.GraphedHead(student), speed.GraphedHead(student), []

    def record(inputs, shape):
        # the two blocks of the head, a pair each, of four: a replay copies no keys and values that it does not read
        kept = [v for v in inputs if isinstance(v, torch.Tensor) and v.ndim == 3 and v.shape[1] == c.shape[1]]
        assert len(kept) == 2 * 2
        assert not graphed.recorded  # the graph of another size, with its activations, was let go before
        recorded.append(shape)
        fixed = [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]
        work = lambda: student.head(*torch.utils._pytree.tree_unflatten(fixed, shape))
        return Replayed(work, output := work()), [v for v in fixed if isinstance(v, torch.Tensor)], output

    monkeypatch.setattr(graphed, "record", record)
    monkeypatch.setattr(graphed, "records", lambda y_s: True)
    for M, N, text in ((2, 2, c), (1, 3, c), (2, 2, c.flip(0)), (1, 2, c)):
        how = WanStudentConfig(M=M, N=N, H=2)
        grids = {"outer_grid": how.outer_grid, "inner_grid": how.inner_grid}
        sample = lambda of, text=text, grids=grids: tmd.sample(
            of, x, text, **grids, generator=torch.Generator().manual_seed(0)
        )
        assert torch.equal(sample(graphed), sample(student)) and torch.equal(sample(plain), sample(student))
    assert len(recorded) == 1 and not plain.recorded
    failing = speed.GraphedHead(student)
    monkeypatch.setattr(failing, "records", lambda y_s: True)
    monkeypatch.setattr(
        failing, "record", Mock(side_effect=RuntimeError("operation not permitted\nwhen stream is capturing"))
    )
    assert (
        torch.equal(sample(failing), sample(student))
        and "without a CUDA graph: operation not permitted\n" in capsys.readouterr().out
    )
    assert torch.equal(sample(failing), sample(student)) and failing.record.call_count == 1  # tried once
    with torch.no_grad():
        m, y, one = student.features(x, batch[1], c), torch.randn_like(x), torch.ones(len(x), dtype=torch.float64)
        first = graphed.head(y, one, one / 2, m)
        kept = first.clone()
        graphed.head(-y, one, one / 2, m)
        assert torch.equal(first, kept)
        graphed.head(y[:1], one[:1], one[:1] / 2, student.features(x[:1], batch[1][:1], c[:1]))
        assert len(recorded) == len(graphed.recorded) + 1 == 2
    # no graph in training
    assert graphed.head(y, one, one / 2, student.features(x, batch[1], c)).requires_grad and len(recorded) == 2


def test_norms_keep_the_dtype():
    """Where autocast's norm gives float32 (a GPU's does), the processor gets q and k in the dtype of v."""
    attn = Mock(heads=2, norm_q=lambda q: q.float(), norm_k=lambda k: k.float())
    half = torch.ones(1, 3, 4, dtype=torch.bfloat16)
    assert speed.Seen(attn).norm_q(half).dtype == speed.Seen(attn).norm_k(half).dtype == torch.bfloat16
