"""What makes Wan fast changes no result: attention backends, recomputation, compiled blocks, prompts kept, the graphed head."""

import pytest
import torch

import tmd_minimal as tmd

pytest.importorskip("diffusers")
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.utils._python_dispatch import TorchDispatchMode

from wan_scale import speed
from wan_scale.config import WanStudentConfig
from wan_scale.model import WanNetwork, load_transformer
from wan_scale.tiny import make_tiny


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
    """Half precision goes to the backend that was chosen, float32 (the finite difference) to native, whatever autocast the rest runs in."""
    asked = []
    stock = speed.WanAttnProcessor.__call__
    monkeypatch.setattr(
        speed.WanAttnProcessor, "__call__", lambda self, *a, **k: (asked.append(self._attention_backend), stock(self, *a, **k))[1]
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
    assert set(times) == {"native", "cudnn", "flash", "flex"} and times["native"] > 0 and isinstance(times["cudnn"], str)
    assert speed.fastest({"native": 2.0, "cudnn": 1.0, "flash": "RuntimeError: no"}) == "cudnn"
    with pytest.raises(RuntimeError, match="no attention backend runs here"):
        speed.fastest({"flash": "RuntimeError: no"})


@pytest.mark.parametrize(("mode", "again"), [("none", 0), ("selective", 0), ("full", 1)])
def test_selective_recomputation_leaves_attention_out(net, batch, mode, again):
    """Every block has two attentions: computed once with "none" and "selective", once more in the backward pass with "full"."""
    student = tmd.TMDStudent(speed.prepare(net, checkpointing=mode), 2)
    with Seen() as seen:
        y = rollout(student, batch, N=2)
        forward = seen.attended
        y.square().mean().backward()
    blocks = len(net.blocks) - 2 + 2 * 2
    assert forward == 2 * blocks and seen.attended - forward == again * forward


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks_compute_the_same(net, batch, mode):
    """Loss and every gradient of a rollout are those of eager blocks, with any recomputation; and all blocks share one compilation."""
    torch._dynamo.reset()
    speed.compiled_forward = None
    torch._dynamo.utils.counters.clear()
    losses, grads = [], []
    for on in (False, True):
        torch.manual_seed(0)
        student = tmd.TMDStudent(net, 2)  # a deep copy: its blocks must not be those of `net`
        student.load_state_dict({k: v + 0.01 * torch.randn_like(v) for k, v in student.state_dict().items()})
        speed.prepare(student.net, compiled=on, checkpointing=mode)
        loss = rollout(student, batch).square().mean()
        loss.backward()
        losses.append(loss)
        grads.append({name: p.grad for name, p in student.named_parameters()})
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)
        assert grad.abs().sum() > 0, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_frozen_network_keeps_what_it_made_of_a_prompt(net, batch):
    """Over M transitions of N inner steps: the same sample bit for bit, text and every block's keys made once; not for another prompt."""
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


def test_graphed_head_is_the_head(net, batch):
    """Without a card the graphed head is the student's own, in Algorithm 1 and outside (on a card: tests/test_cuda.py)."""
    x, _, c = batch
    student = tmd.TMDStudent(net, 2)
    graphed, how = speed.GraphedHead(student), WanStudentConfig(M=2, N=2, H=2)
    grids = {"outer_grid": how.outer_grid, "inner_grid": how.inner_grid}
    draws = lambda: torch.Generator().manual_seed(0)
    assert torch.equal(tmd.sample(graphed, x, c, **grids, generator=draws()), tmd.sample(student, x, c, **grids, generator=draws()))
    assert not graphed.recorded
