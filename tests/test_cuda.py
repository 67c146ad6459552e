"""The same lines on a GPU; skipped without one."""

import pytest
import torch

import tmd_minimal as tmd
from planar import PlanarDiscriminator, PlanarNet


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_training_and_sampler_runs_on_a_gpu_and_resumes(tmp_path):
    """Teacher, both stages, KD and sampling on cuda: finite, on the device, and a finished checkpoint loads to the same bits."""

    def data(n, generator):
        return torch.randn(n, 2, generator=generator, device=generator.device), torch.randint(2, (n,), generator=generator, device="cuda")

    def everything():
        tmd.seed_everything(0)
        run = {"progress": False, "c_neg": 2}
        net = PlanarNet(2, 32, 4, 2).cuda()
        teacher, _ = tmd.train_teacher(net, data, updates=20, batch=64, lr=1e-3, path=str(tmp_path / "teacher.pt"), **run)
        how = tmd.StudentConfig(M=2, N=2, H=2)
        student = tmd.TMDStudent(teacher, 2).cuda().requires_grad_(True)
        stage1 = tmd.Stage1Config(updates=20, batch=64, lr=1e-3)
        student.load_state_dict(tmd.train_stage1(student, data, how, stage1, path=str(tmp_path / "1.pt"), **run)[0].state_dict())
        pairs = lambda g: (torch.randn(64, 2, generator=g, device="cuda"), *data(64, g))
        tmd.train_kd(student, pairs, how, updates=5, lr=1e-3, progress=False, path=str(tmp_path / "kd.pt"))
        disc = PlanarDiscriminator(32, 2).cuda()
        stage2 = tmd.Stage2Config(iterations=20, batch=64, lr=1e-3)
        ema, _ = tmd.train_stage2(student, teacher, disc, data, how, stage2, taps=(1, 2), path=str(tmp_path / "2.pt"), **run)
        x_1 = torch.randn(100, 2, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        grids = {"outer_grid": how.outer_grid, "inner_grid": how.inner_grid}
        return tmd.sample(ema, x_1, **grids, generator=torch.Generator("cuda").manual_seed(2))

    first = everything()
    assert first.is_cuda and torch.isfinite(first).all()
    assert torch.equal(first, everything())
