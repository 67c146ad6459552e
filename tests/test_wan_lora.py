"""--lora: one frozen base under student, teacher and fake score; nobody's adapter reaches another's call, and the
export is plain again.
"""

import copy
from dataclasses import replace

import pytest
import torch

import tmd_minimal as tmd

pytest.importorskip("diffusers")
pytest.importorskip("peft")
import diffusers
import test_wan_plan
import wan_data_help
import wan_ranks
import worlds

from wan_scale.config import Wan, preset
from wan_scale.cost.memory import memory
from wan_scale.cost.plan import plan
from wan_scale.cost.report import report
from wan_scale.cost.sizes import WAN, lora_parameters, parameters
from wan_scale.data.teacher import generate
from wan_scale.model import WanNetwork, load_transformer
from wan_scale.pipeline import TMDWanPipeline
from wan_scale.sampling import sample
from wan_scale.tiny import TRANSFORMER, make_tiny
from wan_scale.training import lora, students, train
from wan_scale.training.checkpoints import complete

FAST = {
    "stage1_updates": 3,
    "stage2_iterations": 5,
    "save_every": 2,
    "preview_every": 0,
    "global_batch": 2,
    "lora": 4,
    "stage2_lr": 1e-3,
}
H, L, RANK = 2, 4, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny folder and four teacher clips of two steps."""
    root = tmp_path_factory.mktemp("wan")
    model = make_tiny(root / "tiny")
    (root / "prompts.txt").write_text("a red ball\na blue cube\na green cat runs\na small dog\n")
    generate(model, root / "prompts.txt", root / "data", frames=9, height=64, width=64, steps=2, shard_size=4)
    return root


@pytest.fixture
def batch(g):
    x, c = torch.randn(2, 16, 3, 8, 12, generator=g), torch.randn(2, 20, 32, generator=g)
    return x, torch.tensor([0.3, 0.9], dtype=torch.float64), c


def settings(world, out, **more) -> Wan:
    return preset("tiny", model=str(world / "tiny"), data=str(world / "data"), out=str(out), **{**FAST, **more})


def roles(world, dtype=torch.float32, checkpointing="none", stir=True):
    """(student, teacher, fake score) on one base; stir: adapters that do something, the same at every call."""
    torch.manual_seed(0)
    make = lambda dtype: WanNetwork(load_transformer(world / "tiny", dtype), checkpointing)
    base = lora.adapt(make(dtype), RANK, 10.0, {"student": L - H, "fake": L})
    student = tmd.TMDStudent(lora.graft(make(torch.float32), base, H), H)
    found = student, lora.Role(base), lora.Role(base, "fake")
    with torch.no_grad():
        for p in (p for net in found[::2] for name, p in net.named_parameters() if stir and name.endswith("B.weight")):
            p.copy_(0.05 * torch.randn(p.shape))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_are_the_base(world, batch, dtype):
    """Teacher, fake score and their features are the stock network's to the last bit, and so is the student an ordinary
    new one's.
    """
    student, teacher, fake = roles(world, dtype, stir=False)
    stock, (x, t, c) = WanNetwork(load_transformer(world / "tiny", dtype)), batch
    assert torch.equal(teacher(x, t, c), stock(x, t, c)) and torch.equal(fake(x, t, c), stock(x, t, c))
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.taps(x, t, c, (1, 3)), stock.taps(x, t, c, (1, 3)), strict=True)
    )
    if dtype == torch.float32:
        with torch.no_grad():
            student.gate.fill_(-40.0)
        torch.testing.assert_close(
            student.head(x, t, t, student.features(x, t, c)), stock(x, t, c), rtol=1e-5, atol=1e-6
        )


def test_each_role_owns_what_it_trains(world):
    """The teacher has no parameters, the fake score its adapter, the student adapter and all outside the backbone: in
    float32.
    """
    student, teacher, fake = roles(world, torch.bfloat16)
    whole = tmd.TMDStudent(WanNetwork(load_transformer(world / "tiny")), H)
    backbone = tuple(f"net.transformer.blocks.{i}." for i in range(L - H))
    own = {name for name, _ in student.named_parameters() if ".adapter." not in name}
    assert own == {name for name, _ in whole.named_parameters() if not name.startswith(backbone)}
    assert all(".adapter." in name for name, _ in fake.named_parameters()) and not list(teacher.parameters())
    linears = [m for block in whole.net.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert len(list(fake.parameters())) == 2 * len(linears) == 80 and len(list(student.parameters())) == len(own) + 40
    assert all(p.requires_grad and p.dtype == torch.float32 for net in (student, fake) for p in net.parameters())
    base = teacher.blocks[0].block
    assert base is student.net.blocks[0].block is fake.blocks[0].block is copy.deepcopy(student).net.blocks[0].block
    assert (
        base.attn1.to_q.base_layer.weight.dtype == torch.bfloat16
        and not base.attn1.to_q.base_layer.weight.requires_grad
    )
    mine = {id(p) for p in student.parameters()}
    assert (
        not mine & {id(p) for p in fake.parameters()}
        and student.state_dict().keys() == dict(student.named_parameters()).keys()
    )


def calls(who, nets, batch):
    """What a role does, in three steps with a pause after each: two calls, then the backward pass -> (output,
    gradients).
    """
    (student, teacher, fake), (x, t, c) = nets, batch
    seen = x.clone().requires_grad_()
    leaves = {"student": list(student.parameters()), "teacher": [seen], "fake": list(fake.parameters())}[who]
    if who == "student":
        m = student.features(x, t, c)
        yield
        out = student.head(x, t, t / 2, m)
    elif who == "teacher":
        h = teacher.taps(seen, t, c, (1,))[0]
        yield
        out = torch.cat([h.flatten(), teacher(seen, t, c).flatten()])
    else:
        v = fake(x, t, c)
        yield
        out = v + fake(0.5 * x, t, c)
    yield
    out.square().mean().backward()
    yield out.detach(), [p.grad for p in leaves]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_no_adapter_leaks(world, batch, checkpointing):
    """Student, teacher and fake score called in turns, backward passes last: outputs and gradients are those of each
    alone on its base.
    """
    alone = {
        who: list(calls(who, roles(world, checkpointing=checkpointing), batch))[-1]
        for who in ("student", "teacher", "fake")
    }
    nets = roles(world, checkpointing=checkpointing)
    running = {who: calls(who, nets, batch) for who in alone}
    for _ in range(2):
        for role in running.values():
            next(role)
    for who in ("student", "fake", "teacher"):
        (out, gradients), (wanted_out, wanted) = next(running[who]), alone[who]
        assert torch.equal(out, wanted_out), who
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True)), who
    mute = roles(world, stir=False)  # and the adapters do something, in the output and in the gradients
    for who in ("student", "fake"):
        out, gradients = list(calls(who, mute, batch))[-1]
        assert not torch.equal(out, alone[who][0])
        assert all(
            p.grad.abs().sum() > 0
            for name, p in nets[0 if who == "student" else 2].named_parameters()
            if ".adapter." in name
        )


def test_checkpointing_changes_no_gradient(world, batch):
    """Checkpointed blocks, called again after the other roles, give the gradients of plain ones, for N head calls."""
    (x, t, c), grads = batch, []
    for checkpointing in ("none", "full"):
        student, teacher, fake = roles(world, checkpointing=checkpointing)
        y = tmd.inner_flow(tmd.transition(student, x, t, c), torch.ones_like(x), tmd.make_grid(3, 10.0))
        loss = (
            y.square().mean() + fake(y.detach(), t, c).square().mean() + teacher.taps(y, t, c, (2,))[0].square().mean()
        )
        loss.backward()
        grads.append([p.grad for net in (student, fake) for name, p in net.named_parameters() if ".adapter." in name])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
        assert a.abs().sum() > 0


def kept_base(monkeypatch) -> list:
    """The bases that the phases make, for a look afterwards."""
    made, adapt = [], lora.adapt
    monkeypatch.setattr(lora, "adapt", lambda *args: made.append(adapt(*args)) or made[-1])
    return made


def kept_phase(monkeypatch) -> dict:
    kept, on_step = {}, train.Training.on_step

    def look(job, how, phase, terms):
        kept["phase"] = phase
        on_step(job, how, phase, terms)

    monkeypatch.setattr(train.Training, "on_step", look)
    return kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_moves_the_adapters_alone(world, tmp_path, batch, monkeypatch, precision):
    """After stage 1 and stage 2 the base is the folder's to the last bit and the teacher says what it said, while both
    adapters moved.
    """
    made, kept, (x, t, c) = kept_base(monkeypatch), kept_phase(monkeypatch), batch
    cfg = settings(world, tmp_path, precision=precision, checkpointing="full" if precision == "bf16" else "none")
    stock = load_transformer(world / "tiny", torch.bfloat16 if precision == "bf16" else torch.float32)
    for work in (train.stage1, train.stage2):
        assert work(cfg)["recipe"]["--lora"] == RANK
        base, names = made[-1], dict(stock.named_parameters())
        assert not base.transformer.patch_embedding.weight.requires_grad
        held = {
            name.replace(".base_layer", ""): p
            for name, p in base.transformer.named_parameters()
            if ".lora_" not in name
        }
        assert held.keys() == names.keys() and all(torch.equal(held[name], p) for name, p in names.items())
        assert torch.equal(lora.Role(base)(x, t, c), WanNetwork(stock)(x, t, c))
    nets = kept["phase"].nets
    # they start at 0
    moved = lambda net: [p.abs().sum() > 0 for name, p in net.named_parameters() if name.endswith("B.weight")]
    assert all(moved(nets["student"])) and all(moved(nets["fake"])) and len(moved(nets["fake"])) == 40
    own = dict(nets["student"].named_parameters())
    assert not torch.equal(own["net.transformer.blocks.3.ffn.net.2.weight"], stock.blocks[3].ffn.net[2].weight)
    trained = sum(p.numel() for net in nets.values() for p in net.parameters())
    weights = sum(
        v.numel() for key, v in kept["phase"].tensors().items() if not key.startswith("ema.") and ".exp_avg" not in key
    )
    steps = sum(key.endswith(".step") for key in kept["phase"].tensors())
    assert weights == trained + steps and {*kept["phase"].ema.named} == {*own}  # nothing frozen is saved or in the EMA


class Interrupted(Exception):
    pass


def test_resume_is_bitwise(world, tmp_path, monkeypatch):
    """Stopped between two checkpoints of either stage and started again: the same bytes as a run in one piece."""
    whole, parts = (settings(world, tmp_path / name) for name in ("whole", "parts"))
    train.stage1(whole), train.stage2(whole)
    seen = train.Training.on_step
    for work, step in ((train.stage1, 3), (train.stage2, 3)):

        def on_step(job, how, phase, terms, step=step):
            seen(job, how, phase, terms)
            if phase.step == step:
                raise Interrupted

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(train.Training, "on_step", on_step)
            work(parts)
        assert complete(parts.folder(work.__name__, "checkpoints"))
        work(parts)
    for phase in ("stage1", "stage2"):
        assert (whole.folder(phase) / "student.safetensors").read_bytes() == (
            parts.folder(phase) / "student.safetensors"
        ).read_bytes()
    with pytest.raises(RuntimeError, match="made with another --lora-scale"):
        train.stage2(settings(world, tmp_path / "whole", lora_scale=1.0))


def test_adapters_of_a_damaged_base_are_refused(world, tmp_path):
    """A flipped bit in the teacher where its fingerprint does not look: they would be merged into other weights."""
    cfg = settings(world, tmp_path / "out", stage1_updates=0)
    train.stage2(cfg)
    sample.make_model(cfg)
    other = replace(cfg, model=str(wan_data_help.with_a_flipped_bit(world / "tiny", tmp_path / "copy")))
    assert students.transformer_of(other) == students.transformer_of(cfg)
    with pytest.raises(RuntimeError, match=r"adapters of another transformer than .*, or that one is damaged; give"):
        sample.make_model(other)


def test_export_is_merged(world, tmp_path, monkeypatch):
    """The exported folder has no adapter, loads by one call, and samples what the student with its adapter samples."""
    kept, cfg = kept_phase(monkeypatch), settings(world, tmp_path, stage1_updates=0)
    train.stage2(cfg)
    pipe = TMDWanPipeline.from_pretrained(sample.export(cfg))
    plain = pipe.transformer.student
    assert (
        plain.state_dict().keys() == tmd.TMDStudent(WanNetwork(load_transformer(world / "tiny")), H).state_dict().keys()
    )
    x, c, how = torch.randn(2, 16, 3, 8, 8), torch.randn(2, 20, 32), cfg.how()
    with kept["phase"].ema_weights() as student:
        wanted = train.draw(student, how, x, c, seed=0)
        adapters = [p for name, p in student.named_parameters() if name.endswith("B.weight")]
        with torch.no_grad():
            [p.mul_(-1) for p in adapters]
        other = train.draw(student, how, x, c, seed=0)
    found = train.draw(plain, how, x, c, seed=0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (other - wanted).norm() > 100 * (found - wanted).norm()  # the adapters do something that rounding does not


def test_baseline_shares_the_base_too(world, tmp_path):
    """DMD2-v's student has its adapter on every block and only embeddings and output layer of its own; it exports as
    well.
    """
    cfg = settings(world, tmp_path, student="dmd2v")
    assert train.stage2(cfg, plain=True)["effective_nfe"] == 2
    assert sample.make_model(cfg).student.net.blocks[3].ffn.net[2].weight.shape == (48, 96)


@pytest.mark.slow
def test_two_ranks_equal_one(world, tmp_path, monkeypatch):
    """Two gloo ranks, each with the whole base, make the updates of one process: with a clip each, and with every clip
    cut over both.
    """
    for key, value in {"lora": RANK, "stage1_updates": 0, "stage2_iterations": 5}.items():
        monkeypatch.setitem(wan_ranks.SETTINGS, key, value)
    worlds.launch(2, wan_ranks.adapters, world, tmp_path, RANK)
    one = wan_ranks.run("stage2", world, tmp_path / "one")
    for two in (torch.load(tmp_path / name / "found.pt", weights_only=True) for name in ("two", "cut")):
        assert (one["world"], two["world"]) == (1, 2) and one["tensors"].keys() == two["tensors"].keys()
        for name, x in one["tensors"].items():
            y = two["tensors"][name]
            if name.endswith(".exp_avg"):  # gradients: alike to the rounding of a sum's order
                assert (x - y).abs().max() <= 1e-4 * x.abs().max() + 1e-7, name
            elif not name.endswith((".exp_avg_sq", ".step")):  # AdamW makes of a rounding near 0 a step of its rate
                assert ((x - y).abs() > 1e-4).float().mean() < 0.05, name


def test_plan_counts_the_adapters(world):
    """plan's parameters of the student's own part and of both adapters are those of the real modules, at two H."""
    config = {**TRANSFORMER, "in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "cross_attn_norm": True}
    student, _, fake = roles(world)
    found = lora_parameters(config, H, RANK)
    count = lambda net, adapter: sum(
        p.numel() for name, p in net.named_parameters() if (".adapter." in name) == adapter
    )
    assert found == {"own": count(student, False), "student": count(student, True), "fake": count(fake, True)}


@pytest.mark.parametrize("rank", [8, 64])
def test_live_block_estimate(rank):
    """What an adapted block saves under bf16 autocast is plan's estimate to 4 %."""
    n, config = 2048, {**test_wan_plan.WIDE, "ffn_dim": 1024}
    base = WanNetwork(diffusers.WanTransformer3DModel(**config))
    for layer in (m for m in base.blocks.modules() if isinstance(m, torch.nn.Linear)):
        layer.bfloat16()
    block = lora.Role(lora.adapt(base, rank, 1.0, {"fake": 2}), "fake").blocks[0]
    h, text = torch.randn(1, n, 256, dtype=torch.bfloat16, requires_grad=True), torch.randn(1, 8, 256)
    six, rope = torch.randn(1, 6, 256, requires_grad=True), (torch.randn(1, n, 1, 64), torch.randn(1, n, 1, 64))
    found = test_wan_plan.saved_bytes(lambda: block(h, text, six, rope), block.block)
    found -= 2 * sum(p.numel() for p in block.parameters())  # autocast's copies of A and B
    said = memory(config, n, "stage1", H=1, lora=rank)["block and discriminator at work"]
    assert said == pytest.approx(found, rel=0.04)


def test_plan_of_one_gpu():
    """14B trains on one GPU of 141 GB with adapters and not without; the report says so, and what the base costs."""
    with_, without = (plan("14b", gpus=1, lora=rank, disc_checkpointing=True) for rank in (64, 0))
    assert with_["fits"] and not without["fits"]
    terms = with_["memory"]["student"]
    assert terms["shared base, bf16"] == 2 * parameters(WAN["14b"])["total"]
    # stage 1 has no teacher: 35 blocks of the base are the student's backbone, and the rest is gone
    assert with_["memory"]["stage1"]["shared base, bf16"] == 2 * 35 * parameters(WAN["14b"])["block"]
    assert (
        with_["checkpoint bytes"] < without["checkpoint bytes"] / 5
        and with_["seconds"]["critic"] < without["seconds"]["critic"]
    )
    text = report("14b", gpus=1, lora=64, disc_checkpointing=True)
    assert "It fits." in text and "LoRA of rank 64" in text and "shared base" in text
    two = plan("14b", gpus=2, lora=64, disc_checkpointing=True)
    # every GPU holds all
    assert two["memory"] == with_["memory"] and two["seconds"]["stage2"] == with_["seconds"]["stage2"] / 2


def test_what_cannot_be_is_said(world, tmp_path):
    """A head as long as the network, a negative rank, and a teacher with adapters get a sentence each."""
    with pytest.raises(
        ValueError, match=r"of 4 blocks none is left for the student's adapter; make the flow head \(--H\) shorter"
    ):
        train.stage1(settings(world, tmp_path, H=4))
    with pytest.raises(ValueError, match="lora is -1; it must be at least 0"):
        settings(world, tmp_path, lora=-1)
    with pytest.raises(ValueError, match="the teacher is trained in full; leave --lora to the students"):
        train.teacher(settings(world, tmp_path, teacher_updates=1))
