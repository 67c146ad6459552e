"""`plan`: its parameters, FLOPs and bytes against PyTorch's own counts on the real classes, and what it says about
fitting.
"""

import json
import math
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import tmd_minimal as tmd
from wan_scale.cost.memory import RESERVE, choose_checkpointing, memory, moments
from wan_scale.cost.plan import RUNS, advice, plan
from wan_scale.cost.report import report
from wan_scale.cost.sizes import GB, SCALES, WAN, discriminator, latent, parameters, student_parameters, tokens
from wan_scale.cost.work import CHECKPOINTING, UNITS, flops, measured_rates, step_flops, step_work

diffusers = pytest.importorskip("diffusers")
from wan_scale import model as M  # noqa: E402
from wan_scale import speed  # noqa: E402
from wan_scale.config import preset  # noqa: E402
from wan_scale.rehearsal import report as rehearsed  # noqa: E402
from wan_scale.training.phase import Feed, WanPhase, in_step  # noqa: E402

TINY = dict(num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=4, in_channels=16, out_channels=16,
            text_dim=32, freq_dim=32, patch_size=[1, 2, 2], cross_attn_norm=True)  # fmt: skip
CLIP = (9, 64, 96)  # frames, height, width
TEXT = 24


def count(run, backend=SDPBackend.MATH) -> float:
    """FLOPs of run(), backward passes included; attention by its two matrix products, or fused, where its gradient
    counts 2.5 times.
    """
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    products = lambda q, k, *_, **__: 4 * math.prod(q) * k[-2]
    back = lambda g, q, k, *_, **__: 10 * math.prod(q) * k[-2]
    known = {fused: products, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: back}
    with FlopCounterMode(display=False, custom_mapping=known) as counter, sdpa_kernel(backend):
        run()
    return counter.get_total_flops()


def network(config=TINY, checkpointing="full"):
    """The stock transformer in tmd's contract, with full activation checkpointing."""
    return M.WanNetwork(diffusers.WanTransformer3DModel(**config), checkpointing)


def data(n, generator):
    return torch.randn(n, 16, *latent(*CLIP), generator=generator), torch.randn(
        n, TEXT, TINY["text_dim"], generator=generator
    )


# ---- Parameters and FLOPs --------------------------------------------------------------------------------------------


size = lambda net: sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name, billions", [("1.3b", 1.419), ("14b", 14.288)])
def test_parameters_of_the_published_sizes(name, billions):
    """1.3B has 1.419 B parameters and 14B 14.288 B: exactly those of the stock transformer, on the meta device."""
    with torch.device("meta"):
        net, found = network(WAN[name]), parameters(WAN[name])
    assert found["total"] == size(net) and found["total"] / 1e9 == pytest.approx(billions, abs=5e-4)
    assert found["block"] == size(net.blocks[0]) and found["blocks"] == size(net.blocks)


@pytest.mark.parametrize(
    "change", [{}, {"cross_attn_norm": False, "out_channels": None, "in_channels": 8}, {"attention_head_dim": 32}]
)
def test_parameters_of_teacher_and_student(change):
    """The parts of the teacher and of the TMD student around it are exact, whatever the config."""
    config = TINY | change
    teacher = network(config)
    student, found, added = tmd.TMDStudent(teacher, 3), parameters(config), student_parameters(config, 3)
    assert found["total"] == size(teacher) and found["block"] == size(teacher.blocks[0])
    assert found["output"] == size(teacher.transformer.proj_out) + teacher.transformer.scale_shift_table.numel()
    assert (
        added["total"] == size(student)
        and added["span"] == size(student.span)
        and added["fusion"] == size(student.fuse)
    )
    assert student_parameters(config, 0)["total"] == size(teacher)


@pytest.mark.parametrize(
    "frames, height, width, n", [(81, 480, 832, 32760), (81, 720, 1280, 75600), (1, 480, 832, 1560), (9, 64, 96, 72)]
)
def test_tokens(frames, height, width, n):
    """The VAE and the patches leave 32,760 tokens of 81 frames of 480x832."""
    assert tokens(WAN["1.3b"], frames, height, width) == n


@pytest.mark.parametrize("name, linear, attention", [("1.3b", 82, 201), ("14b", 785, 893)])
def test_forward_flops_at_full_size(name, linear, attention):
    """A forward costs 283 TFLOP at 1.3B and 1678 at 14B, as PyTorch counts on the first three blocks at full length."""
    whole = flops(WAN[name], 32760)["whole"]
    assert whole["linear"] / 1e12 == pytest.approx(linear, rel=0.01) and whole["attention"] / 1e12 == pytest.approx(
        attention, rel=0.01
    )
    config = WAN[name] | {"num_layers": 3}
    with torch.device("meta"):
        net, shapes = diffusers.WanTransformer3DModel(**config), ((1, 16, 21, 60, 104), (1,), (1, 512, 4096))
        inputs = [torch.empty(shape) for shape in shapes]
    assert count(lambda: net(*inputs)) == flops(config, 32760, H=1)["whole"]["total"]


@pytest.mark.parametrize("H", [0, 1, 3])
def test_flops_of_the_parts(H):
    """Backbone, head and block cost what PyTorch counts; with H = 0 the backbone is the whole network."""
    teacher, n = network(), tokens(TINY, *CLIP)
    student = tmd.TMDStudent(teacher, H) if H else tmd.PlainStudent(teacher)
    x, c = data(1, None)
    t, part = torch.rand(1), flops(TINY, n, TEXT, H)
    with torch.no_grad():
        m = []
        assert count(lambda: m.append(student.features(x, t, c))) == part["backbone"]["total"]
        assert count(lambda: student.head(x, t, t / 2, m[0])) == part["head"]["total"]
        assert count(lambda: teacher.taps(x, t, c, (0, 2))) == part["embeddings"]["total"] + 3 * part["block"]["total"]


def test_discriminator():
    """The discriminator's parameters are exact and its forward is PyTorch's count to 1 %, at an uneven size too; 67.9 M
    at 1.3B.
    """
    size = (3, 8, 20)
    net, found = M.WanDiscriminator(12, 24, 2, hidden=40), discriminator(TINY, size, 24, taps=2, hidden=40)
    assert sum(p.numel() for p in net.parameters()) == found["parameters"]
    features = [torch.randn(1, 12, *size)] * 2
    assert count(lambda: net(features)) == pytest.approx(found["flops"], rel=0.01)
    for name, millions in (("1.3b", 67.9), ("14b", 170.8)):
        found = discriminator(WAN[name], (21, 60, 104), RUNS[name]["disc_width"])
        assert found["parameters"] / 1e6 == pytest.approx(millions, abs=0.05)
    assert tuple(M.WanDiscriminator.SCALES) == SCALES


# ---- Steps: the real loops of tmd_minimal under PyTorch's counter ----------------------------------------------------


def predicted(kind, n, **kw):
    return sum(step_flops(TINY, n, kind, text=TEXT, attention_backward=2, fp32_slowdown=1, **kw).values())


@pytest.mark.parametrize("share, H", [(0.0, 1), (1.0, 1), (1.0, 3)])
def test_stage1_step(share, H):
    """A stage 1 update with checkpointing costs what the plan says, with the finite difference and without."""
    how, cfg = tmd.StudentConfig(M=2, N=2, H=H), tmd.Stage1Config(updates=2, batch=1, flow_map_share=share)
    c_neg = torch.zeros(TEXT, TINY["text_dim"])
    student = speed.prepare(tmd.TMDStudent(network(), H))
    found = count(lambda: tmd.train_stage1(student, data, how, cfg, c_neg=c_neg, progress=False))
    assert found / 2 == pytest.approx(predicted("stage1", tokens(TINY, *CLIP), H=H, flow_map_share=share), rel=0.02)


@pytest.mark.parametrize("N, H, taps", [(2, 1, (0, 2)), (3, 2, (1, 3)), (1, 0, (1, 3))])
def test_stage2_steps(N, H, taps):
    """A critics' iteration and a student's update with rollout cost what the plan says; H = 0 is DMD2-v."""
    teacher = speed.prepare(network()).requires_grad_(False)
    student = speed.prepare((tmd.TMDStudent(teacher, H) if H else tmd.PlainStudent(teacher)).requires_grad_(True))
    disc = M.WanDiscriminator(12, 12, len(taps), hidden=16)
    how, cfg = tmd.StudentConfig(M=2, N=N), tmd.Stage2Config(iterations=2, student_every=2, batch=1)
    spent = []
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        kept = {"c_neg": torch.zeros(TEXT, TINY["text_dim"]), "progress": False}
        kept["on_step"] = lambda phase, terms: spent.append(counter.get_total_flops())
        tmd.train_stage2(student, teacher, disc, data, how, cfg, taps=taps, **kept)
    shared = dict(
        N=N, H=H, last_tap=taps[-1], disc_flops=discriminator(TINY, latent(*CLIP), 12, taps=2, hidden=16)["flops"]
    )
    critic, update = (predicted(kind, tokens(TINY, *CLIP), **shared) for kind in ("critic", "student"))
    assert spent[0] == pytest.approx(critic, rel=0.02) and spent[1] - spent[0] == pytest.approx(update, rel=0.02)


def test_kd_and_sampling():
    """A KD update and Algorithm 1 cost what the plan says, the sampler exactly."""
    n, how, student = tokens(TINY, *CLIP), tmd.StudentConfig(M=1, N=2, H=1), speed.prepare(tmd.TMDStudent(network(), 1))
    pairs = lambda g: (data(1, g)[0], *data(1, g))
    found = count(lambda: tmd.train_kd(student, pairs, how, updates=1, lr=1e-4, progress=False))
    assert found == pytest.approx(predicted("kd", n, N=2, H=1), rel=0.02)
    x, c = data(1, None)
    grid = tmd.make_grid(3, 5.0)
    found = count(lambda: tmd.sample(student, x, c, outer_grid=grid, inner_grid=how.inner_grid))
    assert found == predicted("sample", n, M=3, N=2, H=1)


def test_step_arithmetic():
    """Fused attention's backward costs 2.5 forwards; the fp32 passes of stage 1 count as often as they are slower, or
    not at all.
    """
    block = flops(TINY, 72, TEXT, 1)["block"]
    fused, plain = (
        sum(step_flops(TINY, 72, "kd", H=1, N=1, text=TEXT, attention_backward=b).values()) for b in (2.5, 2)
    )
    assert fused - plain == pytest.approx(4 * 0.5 * block["attention"])
    step = lambda **kw: step_flops(TINY, 72, "stage1", H=1, text=TEXT, **kw)
    slow, fast = (step(fp32_slowdown=k)["finite difference, fp32"] for k in (3, 1))
    assert slow == pytest.approx(3 * fast) == pytest.approx(0.25 * 6 * flops(TINY, 72, TEXT, 1)["head"]["total"])
    two = step(fp32_slowdown=1, together=2)["finite difference, fp32"]
    assert two / fast == pytest.approx((1 - 0.75**2) / 0.25)  # of two clips at once, at least one
    assert "finite difference, fp32" not in step(flow_map_share=0.0) and "pass for c_neg" not in step(guidance=False)


def test_gpus_toss_the_coin_together():
    """A clip's share of finite differences is the same on any number of GPUs, as in training all toss stage 1's coin
    alike; clips of one micro-batch toss apart, and one of them is enough. So it is with adapters.
    """
    cost = lambda **how: plan("1.3b", **how)["terms"]["stage1"]["finite difference, fp32"]
    assert [in_step(64, gpus) % gpus for gpus in (8, 64)] == [0, 0]  # never a part of the GPUs
    assert cost(gpus=64) == cost(gpus=8) == cost(gpus=1) == cost(gpus=8, lora=64)
    assert cost(gpus=8, micro_batch=2) == pytest.approx(cost(gpus=8) * (1 - 0.75**2) / 0.25)


def test_tf32_leaves_attention_alone():
    """--tf32 makes the finite difference's linear layers four times faster in the plan, from an eighth of the bf16 rate
    to half of it, and its attention no faster.
    """
    difference = [
        plan("1.3b", **preset("1.3b", tf32=tf32).planned())["steps"]["stage1"]["finite difference, fp32"]
        for tf32 in (False, True)
    ]
    head = flops(WAN["1.3b"], 32760)["head"]
    assert difference[0] == pytest.approx(0.25 * 2 * 8 * head["total"])
    assert difference[1] == pytest.approx(0.25 * 2 * (2 * head["linear"] + 8 * head["attention"]))


def test_the_ema_on_the_host_is_planned():
    """--ema-on-host takes the EMA off the GPU in the plan of these settings, and nothing else changes."""
    here, away = (
        plan("1.3b", **preset("1.3b", gpus=1, ema_on_host=host).planned())["memory"]["student"]
        for host in (False, True)
    )
    assert here == away | {"student, EMA": 4 * student_parameters(WAN["1.3b"])["total"]} != away


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_what_is_computed_again(mode):
    """A stage 1 and a KD update cost what the plan says in every mode: nothing again, all but attention, or all."""
    how, n = tmd.StudentConfig(M=1, N=2, H=1), tokens(TINY, *CLIP)
    student, one = (
        speed.prepare(tmd.TMDStudent(network(checkpointing=mode), 1)),
        tmd.Stage1Config(updates=1, batch=1, flow_map_share=1.0),
    )
    pairs = lambda g: (data(1, g)[0], *data(1, g))
    run = {
        "stage1": lambda: tmd.train_stage1(
            student, data, how, one, c_neg=torch.zeros(TEXT, TINY["text_dim"]), progress=False
        ),
        "kd": lambda: tmd.train_kd(student, pairs, how, updates=1, lr=1e-4, progress=False),
    }
    for kind, update in run.items():
        said = step_flops(TINY, n, kind, text=TEXT, H=1, fp32_slowdown=1, flow_map_share=1.0, checkpointing=mode)
        assert count(update, SDPBackend.FLASH_ATTENTION) == pytest.approx(sum(said.values()), rel=0.02)


class Moved(TorchDispatchMode):
    """Bytes that elementwise operations read and write: all but matrix products, attention and views."""

    LEFT_OUT = (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product",
        "empty",
        "detach",
        "_unsafe_view",
        "view",
        "expand",
        "t.",
        "new_empty",
    )

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        where = {t.untyped_storage().data_ptr() for t in read}
        view = not func._schema.is_mutable and all(t.untyped_storage().data_ptr() in where for t in written)
        if not view and not func.__name__.startswith(self.LEFT_OUT):
            self.bytes += sum(t.nbytes for t in (*read, *written))
        return out


def test_moved_bytes():
    """What a block's elementwise work reads and writes, forward and backward, is the plan's count to 3 %."""
    found = {}
    for n in (1024, 2048):  # the difference leaves out what weights cost
        block = diffusers.WanTransformer3DModel(**WIDE).blocks[0]
        h, text, six = (
            torch.randn(1, n, 256, dtype=torch.bfloat16, requires_grad=True),
            torch.randn(1, 8, 256),
            torch.randn(1, 6, 256),
        )
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Moved() as moved:
            out = block(h, text, six, (torch.randn(1, n, 1, 64), torch.randn(1, n, 1, 64)))
            forward = moved.bytes
            out.sum().backward()
        found[n] = forward, moved.bytes - forward
    work = {
        g: step_work(WIDE, 1024, "kd", H=0, N=1, checkpointing=g)["backbone, trained"]["bytes"]
        for g in ("none", "full")
    }
    forward, backward = (b - a for a, b in zip(*found.values()))
    assert work["full"] - work["none"] == pytest.approx(2 * forward, rel=0.03)  # of two blocks
    assert work["none"] == pytest.approx(2 * (forward + backward), rel=0.03)


# ---- Memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(run, *nets) -> int:
    """Bytes that the graph of run() holds for its backward pass, parameters left out."""
    weights, found = {p.untyped_storage().data_ptr() for net in nets for p in net.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no address is used twice
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        run()
    return sum(storage.nbytes() for storage in found.values())


WIDE = {**TINY, "num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 2}


@pytest.mark.parametrize("trained, wide, rel", [(True, 4, 0.08), (False, 2, 0.15)])
def test_live_block_estimate(trained, wide, rel):
    """What one block of the stock model saves under bf16 autocast is the estimate to 8 %, and grows with the
    feed-forward width. With frozen weights, as the teacher's, it is less (to 15 %: the estimate is a GPU's, whose norms
    are float32).
    """
    n, size = 2048, {}
    kind, moment = ("stage1", "head's last block") if trained else ("student", "features of the teacher")
    estimate = lambda config, n, H=5: moments(config, n, kind, H=H, disc=1.0)[moment]["block and discriminator at work"]
    for ffn in (1024, 2048):
        config = {**WIDE, "ffn_dim": ffn}
        block = diffusers.WanTransformer3DModel(**config).blocks[0].requires_grad_(trained)
        h, text, six = torch.randn(1, n, 256, dtype=torch.bfloat16), torch.randn(1, 8, 256), torch.randn(1, 6, 256)
        rope = torch.randn(1, n, 1, 64), torch.randn(1, n, 1, 64)
        # autocast's, which the plan counts by themselves
        copies = 2 * sum(p.numel() for p in block.parameters() if p.ndim == 2)
        size[ffn] = saved_bytes(partial(block, h.requires_grad_(), text, six, rope), block) - copies
        assert estimate(config, n, H=1) == pytest.approx(size[ffn], rel=rel)
    assert size[2048] - size[1024] == pytest.approx(n * wide * 1024, rel=0.01)
    for name, large in (("1.3b", 4.3 if trained else 2.6), ("14b", 12.4 if trained else 7.7)):
        assert estimate(WAN[name], 32760) / GB == pytest.approx(large, abs=0.05)


@pytest.mark.parametrize("N", [1, 3])
def test_rollout_graph_estimate(N):
    """What the student's graph holds with checkpointing, block inputs and what is outside blocks, is the estimate to 5
    %.
    """
    config = {**WIDE, "num_layers": 6}
    student = speed.prepare(tmd.TMDStudent(network(config), 4))
    clip = (17, 256, 256)
    n, size = tokens(config, *clip), latent(*clip)
    x, c = torch.randn(1, 16, *size), torch.randn(1, 8, TINY["text_dim"])
    grids = {"outer_grid": tmd.make_grid(2, 5.0), "inner_grid": tmd.make_grid(N, 5.0)}
    found = saved_bytes(lambda: tmd.generate(student, x, c, **grids), student)
    terms = moments(config, n, "student", N=N, H=4)["head's last block"]  # the first to run backwards
    assert terms["block inputs"] + terms["outside blocks"] == pytest.approx(found, rel=0.05)


def test_states_by_hand():
    """At 1.3B on one GPU: 16 bytes a parameter and the EMA for the student, AdamW and weights for the critics, 2
    for the teacher.
    """
    one = memory(WAN["1.3b"], 32760, "student", disc=67.9e6, disc_bytes=0)
    student, teacher = 1_431_200_320, 1_418_996_800
    assert (
        one["student, weights"] + one["student, AdamW"] + one["gradients"] == 16 * student
        and one["student, EMA"] == 4 * student
    )
    assert one["fake score, weights"] + one["fake score, AdamW"] == 12 * teacher and one["teacher, bf16"] == 2 * teacher
    hidden = 32760 * 1536 * 2  # bf16
    # backbone, head twice, the teacher on the way to its last tap
    assert one["block inputs"] == (25 + 2 * 5 + 30) * hidden
    critic = memory(WAN["1.3b"], 32760, "critic", disc=67.9e6)
    assert critic["gradients"] == 4 * (teacher + 67.9e6)
    eight = memory(WAN["1.3b"], 32760, "student", gpus=8, disc=67.9e6, shard_teacher=False)
    assert eight["student, AdamW"] == one["student, AdamW"] / 8 and eight["teacher, bf16"] == 2 * teacher
    assert eight["discriminator, AdamW"] == one["discriminator, AdamW"] == 8 * 67.9e6
    block = 46_440_704
    # the teacher is bf16 already; of what is trained autocast copies a block
    assert "gathered for use" not in one and critic["gathered for use"] == 2 * block
    assert not {"teacher, bf16", "fake score, weights", "discriminator, weights"} & {
        *memory(WAN["1.3b"], 32760, "stage1")
    }


def test_what_is_gathered_by_hand():
    """14B on eight GPUs: the student's head and what is outside its blocks; of the net that runs backwards a block, the
    next one and the gradients of the last one; a bf16 copy. The N head calls' gradients add up before they go.
    """
    block, D = 351_394_304, 5120
    whole = parameters(WAN["14b"])
    assert whole["block"] == block
    root = 4 * (whole["total"] - 40 * block)
    student = 4 * 5 * block + 4 * (student_parameters(WAN["14b"])["total"] - 40 * block)
    at = lambda kind, **how: moments(WAN["14b"], 32760, kind, gpus=8, disc=170.8e6, **how)
    gathered = lambda *of: {name: terms["gathered for use"] for name, terms in at(*of).items()}
    assert gathered("stage1") == {
        "head's last block": student + 2 * block,
        "head's first block": student + 2 * 4 * block + 2 * block,  # the backbone's last, and gradients
        "backbone": student + 3 * 4 * block + 2 * block,
    }
    assert gathered("critic") == {
        "fake score, last block": student + root + 2 * 4 * block + 2 * block,
        "fake score, the block before": student + root + 3 * 4 * block + 2 * block,
    }
    calls = at("student", N=3)["head, the calls before the last"]
    assert calls["gradients of the head, whole"] > 4 * 5 * block
    assert calls["gathered for use"] == student + 4 * block + 2 * block
    assert calls["block inputs"] == (35 + 2 * 5) * 32760 * D * 2
    assert "head, the calls before the last" not in at("student", N=1)
    features = gathered("student")["features of the teacher"]  # bf16: two of its blocks, what is outside, no copy
    assert features == student + 2 * 2 * block + root / 2
    for kind in ("stage1", "critic", "student"):
        assert max(sum(terms.values()) for terms in at(kind).values()) == sum(
            memory(WAN["14b"], 32760, kind, gpus=8, disc=170.8e6).values()
        )


RECORDS = sorted((Path(__file__).parents[1] / "results" / "wan_rehearsal").glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_within_a_tenth_of_every_rehearsal(path):
    """Of each committed rehearsal the plan has the memory in all, every term above 1 GB, and the FLOPs to 10 %.

    Of sampling it has the student's weights and activations to 5 %, its FLOPs to 0.2 %.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if "sampling" in record:
        found, said = record["sampling"]["student"], rehearsed.planned_sampling(record)
        assert said["memory"] == pytest.approx(found["memory"], rel=0.05)
        assert said["flops"] == pytest.approx(sum(found["flops"].values()), rel=2e-3)
    for kind, said in rehearsed.planned(record).items():
        found = record["counted"][kind]
        for term in rehearsed.TERMS:
            a, b = found["memory"][term], said["memory"][term]
            assert max(a, b) <= GB or b == pytest.approx(a, rel=0.1), (kind, term)
        for what in ("memory", "flops"):
            assert sum(said[what].values()) == pytest.approx(sum(found[what].values()), rel=0.1), (kind, what)


@pytest.mark.parametrize("name", WAN)
def test_memory_falls_with_gpus_and_rises_with_work(name):
    """More GPUs never take more memory each; longer clips, more inner steps and a whole teacher always do."""
    peak = lambda **kw: plan(name, **kw)["peak"]
    for kind in ("stage1", "student", "critic"):
        sizes = [peak(gpus=g)[kind] for g in (1, 2, 4, 8, 16, 32, 64)]
        assert sizes == sorted(sizes, reverse=True)
        assert peak(frames=41)[kind] < peak()[kind] < peak(height=720, width=1280)[kind]
    assert peak(N=2)["student"] < peak(N=4)["student"]
    one, two = plan(name), plan(name, micro_batch=2)
    assert one["peak"]["stage1"] < two["peak"]["stage1"] and one["seconds"]["stage2"] == two["seconds"]["stage2"]
    assert (
        peak()["critic"] < peak(shard_teacher=False)["critic"]
        and peak(disc_checkpointing=True)["critic"] < peak()["critic"]
    )


class Peak(TorchDispatchMode):
    """Bytes of all tensors made within that are alive at once, at the most since `peak` was set."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        real = (t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_meta)
        for storage in (t.untyped_storage() for t in real):
            if storage._cdata not in given | self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size


@pytest.mark.parametrize("mode, micro", [("full", 1), ("selective", 2)])
@pytest.mark.slow  # counted by rehearsals as well (test_wan_rehearse.py)
def test_peak_of_real_updates(mode, micro):
    """What a stage 1, a student's and a critics' update of the real loops hold at their peak, weights and AdamW too, is
    the plan to 7 %.
    """
    config, H, clip, tapped = (
        {**WIDE, "num_attention_heads": 2, "ffn_dim": 768, "num_layers": 4},
        1,
        (9, 192, 192),
        (1, 3),
    )
    n, disc = tokens(config, *clip), discriminator(config, latent(*clip), 32, taps=2, hidden=16)
    x, c, peaks = torch.randn(1, 16, *latent(*clip)), torch.randn(1, 8, 32), {}

    def on_step(phase, terms):
        peaks["stage1" if "tm_mf" in terms else "student" if "vsd" in terms else "critic"] = tracked.peak
        tracked.peak = tracked.now

    for stage in (1, 2):
        student, fake = map(speed.prepare, (tmd.TMDStudent(network(config, mode), H), network(config, mode)))
        outside = 4 * size(student) + 4 * size(fake) * (stage == 2)  # made before the tracking
        how, data = tmd.StudentConfig(M=2, N=2, H=H), lambda k, g: (x, c)
        kw = {"c_neg": torch.zeros(8, 32), "on_step": on_step, "progress": False}
        kw["make"] = partial(WanPhase, feed=Feed(None), accumulate=micro)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Peak() as tracked:
            if stage == 1:
                tmd.train_stage1(student, data, how, tmd.Stage1Config(updates=2, batch=1), **kw)
            else:
                teacher = network(config, mode).requires_grad_(False)
                for p in (p for block in teacher.blocks for p in block.parameters() if p.ndim == 2):
                    p.data = p.data.bfloat16()
                two = tmd.Stage2Config(iterations=4, batch=1, student_every=2)
                critic = M.WanDiscriminator(32, 32, 2, 16, checkpointing=True)
                tracked.peak = tracked.now
                tmd.train_stage2(student, teacher, critic, data, how, two, taps=tapped, fake_score=fake, **kw)
        for kind in ("stage1",) if stage == 1 else ("student", "critic"):
            more = {"disc": disc["parameters"] if stage == 2 else 0}
            more |= {"disc_bytes": disc["features"], "disc_live": disc["live"]}
            said = memory(config, n, kind, H=H, last_tap=3, checkpointing=mode, accumulated=micro > 1, **more)
            assert sum(said.values()) == pytest.approx(peaks[kind] + outside, rel=0.07), kind


# ---- Checkpointing, sharding, rates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAN)
def test_modes_trade_memory_for_time(name):
    """Keeping more takes more memory and less time: none, selective, full, in this order, for every step."""
    plans = [plan(name, gpus=1, checkpointing=mode) for mode in CHECKPOINTING]
    for kind in ("stage1", "student", "critic"):
        a, b, c = (p["peak"][kind] for p in plans)
        assert a > b > c
        a, b, c = (p["seconds"][kind] for p in plans)
        assert a < b < c
    small = {"gpus": 1, "disc_checkpointing": True}
    for mode in CHECKPOINTING:
        assert (
            plan(name, **small, checkpointing=mode, compiled=True)["peak"]["student"]
            < plan(name, **small, checkpointing=mode)["peak"]["student"]
        )


def gpu_of(need):
    """GB of the GPU that just holds `need` bytes."""
    return 1.0001 * need / (1 - RESERVE) / GB


def test_advice_of_more_gpus_and_split_clips():
    """14B on 8 GPUs of 80 GB: fewer GPUs than whole clips need do, if they share clips; that plan fits."""
    how = {"card_gb": 80, "compiled": True, "disc_checkpointing": True}
    text = advice("14b", gpus=8, **how)
    gpus, split = map(int, re.search(r"take (\d+) GPUs and split each clip over (\d)", text).groups())
    whole = int(re.search(r"take (\d+) GPUs, the fewest", text)[1])
    assert 8 < gpus < whole and plan("14b", gpus=gpus, context_parallel=split, **how)["fits"]


def test_chosen_checkpointing():
    """The fastest mode that fits is taken, exactly at its own need, by plan and by choose_checkpointing; the report
    says so.
    """
    need = {mode: max(plan("1.3b", gpus=1, checkpointing=mode)["peak"].values()) for mode in CHECKPOINTING}
    for mode in CHECKPOINTING:
        p = plan("1.3b", gpus=1, checkpointing="auto", card_gb=gpu_of(need[mode]))
        assert p["checkpointing"] == mode and p["fits"]
    held = {"H": 5, "N": 2, "disc": 67.9e6}
    least = max(
        sum(memory(WAN["1.3b"], 32760, kind, checkpointing="selective", **held).values())
        for kind in ("student", "critic")
    )
    pick = lambda budget: choose_checkpointing(WAN["1.3b"], 32760, budget, ("student", "critic"), **held)
    assert pick(least) == "selective" and pick(least - 1) == "full" == pick(0)
    assert "checkpointing: selective (chosen" in report("1.3b", gpus=1, checkpointing="auto")
    assert "checkpointing: full.\nA block keeps its input" in report("1.3b", gpus=1)
    text = report("1.3b", gpus=1, card_gb=gpu_of(need["full"]), checkpointing="selective")
    assert "IT DOES NOT FIT" in text and "with --checkpointing auto" in text


def test_sharding_and_offloading():
    """HSDP divides by the GPUs of one copy; an offloaded teacher leaves its blocks in use; both are offered where they
    help.
    """
    peak = lambda **kw: plan("14b", gpus=16, **kw)["memory"]["student"]
    assert (
        peak(shard_over=8)["student, AdamW"]
        == 2 * peak()["student, AdamW"]
        == plan("14b", gpus=8)["memory"]["student"]["student, AdamW"]
    )
    assert (
        peak(shard_over=16) == peak()
        and plan("14b", gpus=16, shard_over=8)["seconds"] == plan("14b", gpus=16)["seconds"]
    )
    here, away = (plan("1.3b", gpus=1, offload_teacher=away)["memory"]["student"] for away in (False, True))
    teacher = parameters(WAN["1.3b"])
    assert "teacher, bf16" not in away and here["teacher, bf16"] == 2 * teacher["total"]
    assert away["gathered for use"] - here.get("gathered for use", 0) == 2 * (teacher["total"] - 28 * teacher["block"])
    room = lambda name, **kw: gpu_of(max(plan(name, **kw)["peak"].values()))
    assert "with --shard-over 0" in report("14b", gpus=16, card_gb=room("14b", gpus=16), shard_over=4)
    assert "with --offload-teacher" in report("1.3b", gpus=1, card_gb=room("1.3b", gpus=1, offload_teacher=True))


def made_record(**changed):
    """What `bench` would have written on a GPU of known rates."""
    rate = {"linear": 700e12, "weight gradients": 500e12, "convolution": 100e12, "fp32 linear": 50e12,
            "fp32 attention": 20e12, "bytes": 4e12, "fp32 linear, TF32": 350e12,
            "fp32 attention, TF32": 40e12}  # fmt: skip
    flops = 4 * 32760**2 * 1536
    forward, both = flops / 600e12, flops / 600e12 + 2.5 * flops / 450e12
    cases = {
        "attention": {
            "seconds": {
                "cudnn": forward,
                "cudnn, with backward": both,
                "native": 2 * forward,
                "native, with backward": 3 * both,
            }
        },
        "rates": {"seconds": {unit: 1e15 / r for unit, r in rate.items()}, "work": dict.fromkeys(rate, 1e15)},
    }
    return {
        "size": "1.3b",
        "card": "A GPU",
        "date": "2026-11-23",
        "tokens": 32760,
        "config": WAN["1.3b"],
        "attn": "cudnn",
        "cases": cases,
        **changed,
    }


def test_rates_of_a_record():
    """measured_rates gives the GPU's rates back, of the backend and the float32 asked for, and a sentence where one is
    missing.
    """
    rate = measured_rates(made_record())
    known = {
        "linear": 700,
        "weight gradients": 500,
        "attention": 600,
        "attention backward": 450,
        "fp32 linear": 50,
        "fp32 attention": 20,
        "bytes": 4,
    }
    assert {unit: rate[unit] / 1e12 for unit in known} == pytest.approx(known) and set(UNITS) == {*known, "convolution"}
    assert measured_rates(made_record(), tf32=True)["fp32 linear"] == pytest.approx(350e12)
    assert measured_rates(made_record(), attn="native")["attention"] == pytest.approx(300e12)
    with pytest.raises(
        ValueError, match=r"no measured rate of linear, .*; give a JSON that `bench` wrote, or --tflops.$"
    ):
        measured_rates({"cases": {}})


def test_plan_by_measured_rates():
    """With measured rates every second of the plan is work over the rate of its unit, and the report names the GPU."""
    rate, n = measured_rates(made_record()), 32760
    p = plan("1.3b", gpus=1, rates=rate, compiled=True, checkpointing="selective")
    whole, D = flops(WAN["1.3b"], n)["whole"], 1536
    forward = whole["linear"] / 700e12 + whole["attention"] / 600e12 + 30 * n * (42 * D + 4 * 8960) / 4e12
    assert p["forward"] == pytest.approx(forward) and p["teacher sampling"] == pytest.approx(100 * forward)
    head = flops(WAN["1.3b"], n)["head"]
    difference = (
        0.25 * 2 * (head["linear"] / 50e12 + head["attention"] / 20e12 + n * (5 * (42 * D + 4 * 8960) + 116 * D) / 4e12)
    )
    assert p["terms"]["stage1"]["finite difference, fp32"] == pytest.approx(difference)
    assert p["seconds"]["stage1"] == pytest.approx(64 * sum(p["terms"]["stage1"].values()))
    text = report("1.3b", gpus=1, rates=rate)
    assert "rates measured on A GPU with the shapes of 1.3b, 2026-11-23" in text and "not measured" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_plan_command_by_measured_rates(tmp_path, capsys):
    """--rates FILE plans with a bench JSON; a missing one is a sentence."""
    from wan_scale import run

    (tmp_path / "gpu.json").write_text(json.dumps(made_record()))
    assert (
        run.main(["plan", "--gpus", "1", "--rates", str(tmp_path / "gpu.json")]) == 0
        and "A GPU" in capsys.readouterr().out
    )
    assert (
        run.main(["plan", "--rates", str(tmp_path / "none.json")]) and "none.json is missing" in capsys.readouterr().err
    )


# ---- The plan and its words ------------------------------------------------------------------------------------------


def test_one_big_gpu_holds_the_small_model():
    """1.3B fits one 141 GB GPU, and the report says so; the same run on a 24 GB GPU does not."""
    text = report("1.3b", gpus=1, card_gb=141)
    assert plan("1.3b", gpus=1, card_gb=141)["fits"] and "It fits." in text and "TOO MUCH" not in text
    assert "NOT FIT" in report("1.3b", gpus=1, card_gb=24)


@pytest.mark.parametrize(
    "name, gpus, size", [("14b", 1, 141), ("14b", 8, 141), ("14b", 8, 80), ("1.3b", 1, 80), ("1.3b", 2, 48)]
)
def test_advice_holds(name, gpus, size):
    """Where it does not fit, the GPUs that the advice names are the fewest that do, and the clip that it names the
    longest.
    """
    text = report(name, gpus=gpus, card_gb=size)
    fits = lambda **kw: plan(name, card_gb=size, **{"gpus": gpus, **kw})["fits"]
    assert not fits() and "IT DOES NOT FIT" in text and "TOO MUCH" in text
    more, frames = (
        re.search(pattern, text)
        for pattern in (r"take (\d+) GPUs, the fewest", r"keep \d+ and shorten the clips to (\d+) frames")
    )
    both = re.search(r"take (\d+) GPUs and shorten the clips to (\d+) frames", text)
    if more:
        assert [fits(gpus=g) for g in range(gpus + 1, int(more[1]) + 1) if 64 % g == 0][-2:] in ([True], [False, True])
    if frames:
        assert fits(frames=int(frames[1])) and not fits(frames=int(frames[1]) + 4)
    if both:
        assert fits(gpus=int(both[1]), frames=int(both[2])) and not fits(gpus=int(both[1]), frames=int(both[2]) + 4)
    assert bool(both) != bool(more or frames)


def test_advice_is_the_least_change():
    """A GPU that is short by one latent frame is told to drop four frames."""
    peak = max(plan("1.3b", gpus=1, frames=77)["peak"].values()) / GB
    assert "clips to 77 frames" in advice("1.3b", gpus=1, card_gb=1.0001 * peak / (1 - RESERVE))


def test_no_way_out():
    """Cards on which nothing helps are told so."""
    assert "No number of such GPUs" in report("14b", gpus=8, card_gb=6)


def test_times_add_up():
    """Updates times seconds make the hours, twice the GPUs or the rate halve them, and stage 2 is a mean over 1 and 4
    iterations.
    """
    one, two, fast = plan("1.3b", gpus=1), plan("1.3b", gpus=2), plan("1.3b", gpus=1, tflops=800)
    seconds = one["seconds"]
    assert one["hours"]["stage2"] == pytest.approx(4000 * (seconds["student"] + 4 * seconds["critic"]) / 5 / 3600)
    assert seconds["student"] == pytest.approx(64 * sum(one["steps"]["student"].values()) / 400e12)
    assert two["hours"]["stage2"] == pytest.approx(one["hours"]["stage2"] / 2) == pytest.approx(fast["hours"]["stage2"])
    published = {("1.3b", 1): 12000, ("1.3b", 2): 4000, ("14b", 1): 5000, ("14b", 2): 1000}
    assert {key: plan(key[0], M=key[1])["iterations"]["stage2"] for key in published} == published


@pytest.mark.parametrize(
    "name, grid, seconds",
    [("1.3b", (1, 2), 0.70), ("1.3b", (1, 4), 0.90), ("1.3b", (2, 2), 1.39), ("14b", (2, 2), 8.0)],
)
def test_sampling_seconds(name, grid, seconds):
    """At 474 TFLOP/s the transformer takes 0.70 s of a sample at M1N2 to 1.39 s at M2N2 for 1.3B, 8 s for 14B."""
    assert plan(name, tflops=474)["sampling"][grid] == pytest.approx(seconds, rel=0.02)


def test_rollout_costs_what_the_paper_says():
    """A second inner step adds under 17 % to the student's update (N2H5 on 1.3B, section 3.2)."""
    one, two = (sum(plan("1.3b", N=N)["steps"]["student"].values()) for N in (1, 2))
    assert 1 < two / one < 1.17


def test_report_of_a_folder_and_of_the_baseline():
    """A config.json gives the preset's report; DMD2-v has no stage 1 and no inner steps; a tiny config works."""
    as_json = {
        **WAN["1.3b"],
        "patch_size": [1, 2, 2],
        "_class_name": "WanTransformer3DModel",
        "image_dim": None,
        "eps": 1e-6,
    }
    assert report(as_json) == report("1.3b")
    text = report("1.3b", H=0, N=1, M=1)
    assert "DMD2-v" in text and "kd: 10,000 updates" in text and "effective NFE 1.00" in text
    assert "stage1" not in text and "stage 1" not in text
    text = report(TINY, gpus=1, card_gb=8, tflops=0.05, H=1, frames=9, height=64, width=96, batch=4, clips=8)
    assert "It fits." in text and "72 tokens" in text


def test_the_report_leads_with_published_clips():
    """Before anything else it says what clips need no GPU, with disk, licence and the settings that fit, then what this
    teacher's own would cost.
    """
    text = report("1.3b", gpus=8)
    head = text[: text.index("Parameters")]
    assert "250,000 clips of 81 frames of 480x832\n" in head and "2.1 TB; licence CC-BY-NC-4.0" in head
    assert "77 frames of 448x832; give --frames 77 --height 448 --width 832" in head
    assert f"500,000 clips of this teacher: {plan('1.3b', gpus=8)['clip hours']:,.1f} GPU-hours" in head
    assert "give --frames 81" in report("1.3b", gpus=8, frames=77, height=448)


def test_the_report_says_what_it_is():
    """The report calls its times estimates at the given rate, and shows the effective NFE of the paper's settings."""
    text = report("1.3b", tflops=350)
    assert "Estimates from FLOP counts at 350 TFLOP/s" in text and "not measured" in text
    for nfe in ("1.17", "1.50", "2.33", "3.00"):
        assert f"effective NFE {nfe}" in text
    assert max(map(len, text.splitlines())) <= 120


BAD = [
    ({"gpus": 0}, "gpus is 0"), ({"gpus": -2}, "gpus is -2"), ({"gpus": 6}, "does not split over 6"),
    ({"batch": 0}, "batch is 0"), ({"micro_batch": 0}, "micro_batch is 0"), ({"micro_batch": 16}, "16 at a time"),
    ({"student_every": 1}, "student_every is 1"),
    ({"frames": 80}, "4k \\+ 1, such as 81"), ({"frames": 0}, "frames is 0"), ({"frames": -3}, "frames is -3"),
    ({"height": 488}, "height is 488"), ({"width": 840}, "width is 840"), ({"height": 0}, "height is 0"),
    ({"H": 30}, "H = 30"), ({"H": -1}, "H = -1"), ({"M": 0}, "M is 0"), ({"N": 0}, "N is 0"),
    ({"card_gb": 0}, "card_gb"), ({"tflops": float("nan")}, "tflops"), ({"last_tap": 30}, "0 to 29"),
    ({"model": "13b"}, "'1.3b'"), ({"model": {"num_layers": 4}}, "no attention_head_dim"),
    ({"model": {**TINY, "image_dim": 1280}}, "image-to-video"),
    ({"shard_over": 3}, "shard_over 3 does not divide the 8 GPUs"),
    ({"checkpointing": "some"}, "'none', 'selective', 'full'"),
]  # fmt: skip


@pytest.mark.parametrize("settings, message", BAD, ids=[message for _, message in BAD])
def test_bad_settings(settings, message):
    """Settings that cannot run are a ValueError of one sentence that names them."""
    with pytest.raises(ValueError, match=message) as e:
        report(**settings)
    assert str(e.value).endswith(".") and "\n" not in str(e.value)


def test_bad_kinds():
    """A step or a memory of no known kind is a ValueError that lists them, not zero."""
    for call in (lambda: step_flops(TINY, 72, "stage3", H=1), lambda: memory(TINY, 72, "kd", H=1)):
        with pytest.raises(ValueError, match="choose one of 'stage1'"):
            call()


def test_needs_no_torch():
    """The arithmetic imports in well under a second, for it loads neither torch nor diffusers."""
    code = "import sys; from wan_scale.cost.plan import plan; plan('14b')"
    code += "; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1], timeout=30)
