"""The same lines on a GPU; skipped without one."""

import pytest
import torch

import tmd_minimal as tmd
from toys.planar import PlanarDiscriminator, PlanarNet

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_every_training_and_sampler_runs_on_a_gpu_and_resumes(tmp_path):
    """Teacher, both stages, KD and sampling on cuda: finite, on the device, and a finished checkpoint loads to the same
    bits.
    """

    def data(n, generator):
        return torch.randn(n, 2, generator=generator, device=generator.device), torch.randint(
            2, (n,), generator=generator, device="cuda"
        )

    def everything():
        tmd.seed_everything(0)
        run = {"progress": False, "c_neg": 2}
        net = PlanarNet(2, 32, 4, 2).cuda()
        teacher, _ = tmd.train_teacher(
            net, data, updates=20, batch=64, lr=1e-3, path=str(tmp_path / "teacher.pt"), **run
        )
        how = tmd.StudentConfig(M=2, N=2, H=2)
        student = tmd.TMDStudent(teacher, 2).cuda().requires_grad_(True)
        stage1 = tmd.Stage1Config(updates=20, batch=64, lr=1e-3)
        student.load_state_dict(
            tmd.train_stage1(student, data, how, stage1, path=str(tmp_path / "1.pt"), **run)[0].state_dict()
        )
        pairs = lambda g: (torch.randn(64, 2, generator=g, device="cuda"), *data(64, g))
        tmd.train_kd(student, pairs, how, updates=5, lr=1e-3, progress=False, path=str(tmp_path / "kd.pt"))
        disc = PlanarDiscriminator(32, 2).cuda()
        stage2 = tmd.Stage2Config(iterations=20, batch=64, lr=1e-3)
        ema, _ = tmd.train_stage2(
            student, teacher, disc, data, how, stage2, taps=(1, 2), path=str(tmp_path / "2.pt"), **run
        )
        x_1 = torch.randn(100, 2, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        grids = {"outer_grid": how.outer_grid, "inner_grid": how.inner_grid}
        return tmd.sample(ema, x_1, **grids, generator=torch.Generator("cuda").manual_seed(2))

    first = everything()
    assert first.is_cuda and torch.isfinite(first).all()
    assert torch.equal(first, everything())


@pytest.fixture
def wan():
    """A small random Wan of head width 128, which every attention backend takes, in float32 on the GPU; a clip and a
    prompt.
    """
    pytest.importorskip("diffusers")
    from diffusers import WanTransformer3DModel

    from wan_scale.cost.sizes import WAN
    from wan_scale.model import WanNetwork

    torch.manual_seed(0)
    config = WAN["1.3b"] | {"num_layers": 4, "num_attention_heads": 2, "ffn_dim": 512}
    with torch.device("cuda"):
        net = WanTransformer3DModel(**config)
    return WanNetwork(net), torch.randn(1, 16, 5, 16, 16, device="cuda"), torch.randn(1, 64, 4096, device="cuda")


def sampled(student, x, c, M=2, N=3):
    from wan_scale.config import WanStudentConfig

    how = WanStudentConfig(M=M, N=N, H=2)
    grids, draws = {"outer_grid": how.outer_grid, "inner_grid": how.inner_grid}, torch.Generator("cuda").manual_seed(0)
    with torch.autocast("cuda", torch.bfloat16):
        return tmd.sample(student, x, c, generator=draws, **grids)


def test_graphed_head_is_the_head(wan):
    """Algorithm 1 with the head as a CUDA graph gives the eager head's sample bit for bit, at two sizes, twice, with a
    new prompt.
    """
    from wan_scale import speed

    net, x, c = wan
    # its weights require grad, as an exported student's do: what autocast casts, it may cache
    student = tmd.TMDStudent(net, 2).cuda()
    graphed = speed.GraphedHead(student)
    for clip, prompt in ((x, c), (x, c.flip(1)), (x[:, :, :3], c), (x, c)):
        assert torch.equal(sampled(graphed, clip, prompt), sampled(student, clip, prompt))
        torch.cuda.empty_cache()
        assert graphed.recorded


def test_patch_embedding_of_the_finite_difference_is_exact(wan):
    """The embedding's derivative by differences of 0.005 is float64's to 0.01 %: with TF32 it would be 2 % off."""
    from wan_scale import speed

    speed.tf32(False)
    net, x, _ = wan
    v = torch.randn_like(x)
    difference = lambda net, x, v: (net.embed(x + 0.005 * v) - net.embed(x - 0.005 * v)) / 0.01
    ours = difference(net, x, v)
    exact = difference(net.double(), x.double(), v.double()).float()
    assert (ours - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("attn", ["cudnn", "flash", "native"])
@pytest.mark.parametrize("compiled", [False, True])
def test_fast_is_the_same_but_for_rounding(wan, attn, compiled):
    """Every backend, eager and compiled, gives the native eager sample to bf16's rounding; and gradients that are
    finite.
    """
    from wan_scale import speed

    net, x, c = wan
    student = tmd.TMDStudent(net, 2).cuda()
    wanted = sampled(student, x, c)
    speed.prepare(student.net, attn=attn, compiled=compiled, checkpointing="selective")
    found = sampled(student, x, c)
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):  # as train.compute
        grids, drawn = (tmd.make_grid(2, 10.0), tmd.make_grid(2, 10.0)), torch.Generator("cuda").manual_seed(0)
        draws = tmd.stage1_draw(x, *grids, flow_map_share=1.0, generator=drawn)
        # its difference in float32 as well
        loss = tmd.tm_mf_loss(student, x, c, **draws, c_neg=torch.zeros_like(c[0]), guidance=3.0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
    backbone, head = student.net.blocks[0], student.gate
    assert head.grad.abs().sum() > 0 and backbone.ffn.net[2].weight.grad.abs().sum() > 0
