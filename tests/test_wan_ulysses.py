"""Context parallelism: one clip over 2 or 4 gloo ranks, and two clips over 2 x 2, give one process's numbers and one
process's gradients.

The ranks are those of worlds.py.
"""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

import tmd_minimal as tmd

pytest.importorskip("diffusers")
import worlds
from counting import Counting
from safetensors.torch import load_file

from wan_scale import speed
from wan_scale.config import WanStudentConfig, preset
from wan_scale.cost.plan import plan
from wan_scale.cost.report import report
from wan_scale.data.teacher import generate
from wan_scale.model import WanDiscriminator, WanNetwork, feature_channels, load_transformer
from wan_scale.tiny import make_tiny
from wan_scale.training import dist, previews, train, ulysses
from wan_scale.training.phase import mixed

HOW, TAPS = WanStudentConfig(M=2, N=2, H=2), (1, 3)


def networks(folder, K: int):
    """Student, teacher, fake score, discriminator, checkpointed, every weight a little off its start; sharded where
    there are ranks.
    """
    torch.manual_seed(0)
    net = ulysses.share(WanNetwork(load_transformer(folder), checkpointing="full"), K)
    student, teacher, fake = (
        tmd.TMDStudent(net, HOW.H),
        net,
        ulysses.share(WanNetwork(load_transformer(folder), "full"), K),
    )
    disc = WanDiscriminator(feature_channels(net), 8, len(TAPS), hidden=16, checkpointing=True)
    with torch.no_grad():
        for p in (*student.parameters(), *fake.parameters()):
            p += 0.02 * torch.randn_like(p)
    student.gate.data += 2  # y_s must count
    return dist.shard(student), dist.shard(teacher.requires_grad_(False)), dist.shard(fake), disc


def draws_of(number: int):
    """Clip, text, empty text and generator of micro-batch `number`."""
    g = torch.Generator().manual_seed(mixed(0, number))
    return torch.randn(1, 16, 3, 8, 8, generator=g), torch.randn(1, 20, 32, generator=g), torch.ones(20, 32), g


def outputs(folder, K: int) -> dict:
    """Velocity, taps, a rollout of the head, a sample, and the gradient of clip through velocity, taps and student."""
    student, teacher, _, disc = networks(folder, K)
    x, c, _, g = draws_of(dist.rank() // K)
    noise, t, x = tmd.randn_like(x, g), torch.tensor([0.7], dtype=torch.float64), x.requires_grad_()
    velocity, taps = teacher(x, t, c), teacher.taps(x, t, c, TAPS)
    y_hat = tmd.inner_flow(tmd.transition(student, x, t, c), noise, HOW.inner_grid)
    found = {"velocity": velocity, "tap 1": taps[0], "tap 3": taps[1], "y_hat": y_hat}
    weighted = {
        "velocity": (velocity * noise).sum(),
        "taps": tmd.gan_loss(disc(taps), as_real=True),
        "y_hat": (y_hat * noise).sum(),
    }
    for name, loss in weighted.items():
        found[f"gradient of clip through {name}"] = torch.autograd.grad(loss, x, retain_graph=True)[0]
    found["sample"] = tmd.sample(student, noise, c, outer_grid=HOW.outer_grid, inner_grid=HOW.inner_grid, generator=g)
    return {name: value.detach() for name, value in found.items()}


def losses(folder, K: int, clips: int | None = None) -> dict:
    """Gradient of every weight, of the mean over `clips` (one a group) of the losses of stage 1, and of stage 2's
    student and critics.
    """
    student, teacher, fake, disc = networks(folder, K)
    groups = dist.world() // K
    mine = range(dist.rank() // K, clips or groups, groups)

    def stage1(x, c, c_neg, g):
        draws = tmd.stage1_draw(x, HOW.outer_grid, HOW.inner_grid, flow_map_share=1.0, cond_drop=0.0, generator=g)
        return {"tm_mf": tmd.tm_mf_loss(student, x, c, **draws, c_neg=c_neg, guidance=3.0, derivative="fd")}

    def stage2(x, c, c_neg, g, critics: bool):
        with torch.set_grad_enabled(not critics):
            x_hat = tmd.generate(student, x, c, outer_grid=HOW.outer_grid, inner_grid=HOW.inner_grid, generator=g)
        more = {"t": tmd.sample_times(x, 5.0, g), "noise": tmd.randn_like(x, g), "taps": TAPS}
        if critics:
            return tmd.stage2_critic_loss(x_hat, x, teacher, fake, disc, c, noise_real=tmd.randn_like(x, g), **more)
        return tmd.stage2_student_loss(x_hat, teacher, fake, disc, c, c_neg, **more, gan_weight=1.0)

    found = {}
    parts = {
        "stage 1": (stage1, {"student": student}),
        "stage 2": (partial(stage2, critics=False), {"student": student}),
    }
    parts["critics"] = (partial(stage2, critics=True), {"fake": fake, "disc": disc})
    for name, (loss, nets) in parts.items():
        for i in mine:
            (sum(loss(*draws_of(i)).values()) / len(mine)).backward()
        dist.reshard(*nets.values())
        for who, net in nets.items():
            dist.average_gradients(net)
            found |= {
                f"{name}, {who}.{key}": dist.full(p.grad) for key, p in net.named_parameters() if p.grad is not None
            }
            net.zero_grad(set_to_none=True)
    assert all(p.grad is None for net in (student, teacher, fake, disc) for p in net.parameters())
    return found


class Stop(Exception):
    pass


def trainings(root, K: int) -> dict:
    """An update of stage 1 with its preview and one of stage 2, as train.py does them: AdamW's first moments
    (gradients) and the clips.
    """
    cfg = preset("tiny", out=str(root / f"out{K}"), model=str(root / "tiny"), data=str(root / "data"),
                 context_parallel=K, checkpointing="full", global_batch=2, micro_batch=1, preview_every=1,
                 preview_prompts=2)  # fmt: skip
    found, seen = {}, train.Training.on_step

    def on_step(job, how, phase, terms):
        if job.name == "stage1":
            seen(job, how, phase, terms)
        moments = {name: p for name, p in phase.tensors().items() if name.endswith("exp_avg")}
        found.update({f"{job.name}.{name}": dist.full(p).clone() for name, p in moments.items()})
        raise Stop

    train.Training.on_step, previews.picture = on_step, lambda *a: None
    for phase in (train.stage1, lambda cfg: train.stage2(replace(cfg, stage1_updates=0))):
        with pytest.raises(Stop):
            phase(cfg)
    dist.barrier()
    train.Training.on_step = seen
    return found | load_file(cfg.folder("stage1", "previews", "step-00000001.safetensors"))


def compiled(root, K: int) -> dict:
    """Velocity and gradient of the clip with compiled blocks and selective checkpointing; why the compiler cut a block,
    if it did.
    """
    x, c, _, _ = draws_of(0)
    net, t = (
        ulysses.share(WanNetwork(load_transformer(root / "tiny"), "selective"), K),
        torch.tensor([0.7], dtype=torch.float64),
    )
    with Counting() as seen:
        found = []
        for on in (False, True):
            speed.prepare(net, compiled=on, checkpointing="selective")
            v = net(x.requires_grad_(), t, c)
            found += [v.detach(), torch.autograd.grad(v.square().sum(), x)[0]]
        return {"found": found, "forward": seen.forward, "backward": seen.backward, "breaks": seen.breaks}


def refusals(root, K: int) -> dict:
    """The sentences that settings which do not divide are refused with."""
    net = WanNetwork(load_transformer(root / "tiny"))
    said = []
    for work in (
        lambda: ulysses.share(net, 3),
        lambda: dist.context_group(3),
        lambda: ulysses.split(torch.zeros(1, 49, 4), K),
    ):
        with pytest.raises(ValueError) as e:
            work()
        said.append(str(e.value))
    return {"said": said}


CASES = {"outputs": lambda root, K: outputs(root / "tiny", K), "losses": lambda root, K: losses(root / "tiny", K),
         "trainings": trainings, "refusals": refusals, "compiled": compiled}  # fmt: skip


def cases(root, work) -> None:
    """On a rank: every (case, GPUs) of `work`, its tensors to a file."""
    for case, cards in work:
        torch.save(CASES[case](root, cards), root / f"{case}-{dist.world()}-{cards}-{dist.rank()}.pt")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of 4 heads and four clips, and what 2 and 4 ranks make of them: case-world-K-rank.pt."""
    root = tmp_path_factory.mktemp("wan")
    make_tiny(root / "tiny", num_attention_heads=4, attention_head_dim=12)
    (root / "prompts.txt").write_text("a red ball\na blue cube\na green cat runs\na small dog\n")
    generate(root / "tiny", root / "prompts.txt", root / "data", frames=9, height=64, width=64, steps=2, shard_size=4)
    two = ("outputs", 2), ("losses", 2), ("refusals", 2), ("compiled", 2)
    four = ("outputs", 4), ("losses", 4), ("outputs", 2), ("losses", 2), ("trainings", 2)
    for world, work in ((2, two), (4, four)):
        worlds.launch(world, cases, root, work)
    return root


def same(one: dict, many: dict, tolerance: float, floor: float = 1e-9) -> None:
    """Every tensor is there and its largest difference is below `tolerance` of its largest number."""
    assert one.keys() == many.keys()
    for name, x in one.items():
        assert x.abs().max() > 0 or "exp_avg" in name, name
        assert (x - many[name]).abs().max() <= tolerance * x.abs().max() + floor, name


SHAPES = pytest.mark.parametrize("world, K", [(2, 2), (4, 4), (4, 2)], ids=["1x2", "1x4", "2x2"])


@SHAPES
def test_outputs(root, world, K, monkeypatch):
    """Velocity, taps, rollout, sample and the gradient of the clip are, on every rank, those of one process."""
    for number in range(world):
        monkeypatch.setattr(dist, "rank", lambda number=number: number // K)
        same(outputs(root / "tiny", 1), torch.load(root / f"outputs-{world}-{K}-{number}.pt"), 1e-5)


@SHAPES
def test_gradients(root, world, K):
    """Gradients of every weight: stage 1 with finite difference, the student's with rollout, the critics'; alike on
    every rank.
    """
    one = losses(root / "tiny", 1, world // K)
    assert {name.split(".")[0] for name in one} == {
        "stage 1, student",
        "stage 2, student",
        "critics, fake",
        "critics, disc",
    }
    for number in range(world):
        same(one, torch.load(root / f"losses-{world}-{K}-{number}.pt"), 1e-4)


def test_training_and_preview(root, monkeypatch):
    """Training on 2 x 2 ranks: each group its own clips and draws, one process's gradients, every clip of the preview
    drawn once.
    """
    monkeypatch.setattr(previews, "picture", None)  # put back after the case has changed it
    one, many = trainings(root, 1), torch.load(root / "trainings-4-2-0.pt")
    assert many["latents"].shape[:2] == (2, 2) and len(many) > 300
    same(one, many, 1e-3, floor=1e-7)


def test_what_does_not_divide(root):
    """Heads, ranks and tokens that K does not divide are refused in a sentence."""
    for words, known in zip(
        torch.load(root / "refusals-2-2-0.pt")["said"], ("the 4 heads", "2 processes", "49 tokens"), strict=True
    ):
        assert known in words and words.endswith(".")
    with pytest.raises(ValueError, match="context_parallel 2 does not divide 1 processes; start a multiple of 2"):
        dist.context_group(2)


def test_compiled_blocks(root):
    """A block with its exchanges is one graph without breaks, keeps its attentions, and computes what eager does."""
    for number in range(2):
        case = torch.load(root / f"compiled-2-2-{number}.pt")
        assert case["forward"] == [2] and case["backward"] == [0] and not case["breaks"]
        (v, gradient), (compiled_v, compiled_gradient) = case["found"][:2], case["found"][2:]
        torch.testing.assert_close(compiled_v, v, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-4, atol=1e-5)
        assert gradient.abs().sum() > 0


def test_plan():
    """Cards that share a clip: activations over K, the student's times as before but for the whole discriminator."""
    one, four = (plan("14b", gpus=16, context_parallel=K) for K in (1, 4))
    a, b = one["memory"]["student"], four["memory"]["student"]
    assert b["block inputs"] == a["block inputs"] / 4 and b["outside blocks"] == a["outside blocks"] / 4
    assert {key: b[key] for key in b if "block" not in key} == {key: a[key] for key in a if "block" not in key}
    rest = lambda p: {term: t for term, t in p["terms"]["stage1"].items() if "difference" not in term}
    assert rest(four) == pytest.approx(rest(one))
    # however many clips there are at once: all GPUs toss stage 1's coin alike
    assert four["seconds"]["stage1"] == pytest.approx(one["seconds"]["stage1"])
    extra = 3 * 64 / 16 * one["steps"]["student"]["discriminator, with input gradient"] / 400e12
    assert four["seconds"]["student"] == pytest.approx(one["seconds"]["student"] + extra)
    few, many = (plan("14b", gpus=gpus, context_parallel=8) for gpus in (256, 512))
    assert many["seconds"]["stage1"] == pytest.approx(few["seconds"]["stage1"] / 2, rel=1e-3)
    text = report("14b", gpus=8, card_gb=141)
    found = int(re.search(r"split each clip over (\d) GPUs with --context-parallel", text)[1])
    assert plan("14b", gpus=8, card_gb=141, context_parallel=found)["fits"] and "on each 2 that share" in report(
        gpus=8, context_parallel=2
    )
    refused = {"12 heads": {"context_parallel": 8}, "6 GPUs": {"gpus": 6, "context_parallel": 4}}
    refused |= {"6 groups of 4": {"gpus": 24, "context_parallel": 4}, "is 0": {"context_parallel": 0}}
    for words, settings in refused.items():
        with pytest.raises(ValueError, match=words):
            plan("1.3b", **settings)
