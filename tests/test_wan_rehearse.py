"""`rehearse`: bytes and FLOPs counted on fake tensors, against sums by hand, PyTorch's own counter, and the plan."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")
from wan_scale import run
from wan_scale.config import preset
from wan_scale.cost.sizes import WAN, tokens
from wan_scale.cost.work import flops
from wan_scale.rehearsal import report
from wan_scale.rehearsal.card import card
from wan_scale.rehearsal.ledger import CARD, HOST, Ledger
from wan_scale.rehearsal.sampling import Counted

KB = 1024
total = lambda found: sum(found["memory"].values())


# ---- The ledger ------------------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    """Weights, what the graph keeps and its gradient, each under its term; the peak is where they meet; what is let go
    of is gone; what lies on the host is not counted.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        w = torch.empty(256, KB, device=CARD, requires_grad=True)  # 1 MB
        ledger.name([w], "weights")
        x, away = torch.empty(KB, KB, device=CARD), torch.empty(KB, KB).sum()  # 4 MB of activations; none
        y = x @ w.T  # 1 MB, not kept by the graph
        del y
        before = len(ledger.events)
        y = (x @ w.T).relu()  # 2 MB at once, 1 of them stays
        y.sum().backward()  # y and the gradient before relu 1 MB each, the weight's gradient 1 MB
        ledger.name([w.grad], "gradients")
        found = ledger.peak(before)
    assert away.device == HOST
    small = found["activations"] - 6 * KB * KB  # single numbers, of 512 bytes each
    assert 0 <= small <= 4 * 512
    there = {"weights": KB * KB, "gradients": KB * KB, "activations": 6 * KB * KB + small}
    assert found == dict.fromkeys(found, 0) | there
    assert ledger.peak(0, 1) == dict.fromkeys(found, 0) | {"weights": KB * KB}


def test_a_cast_weight_is_no_activation():
    """Autocast's copy of a weight counts as gathered for use."""
    with card() as ledger, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        w = torch.empty(KB, KB, device=CARD)
        ledger.name([w], "weights")
        F.linear(torch.empty(8, KB, device=CARD), w)
        assert ledger.peak()["gathered"] == 2 * KB * KB


def test_two_devices_do_not_mix():
    """An operation on tensors of the card and of the host is an error, as on a GPU."""
    with card(), pytest.raises(RuntimeError, match="same device"):
        torch.empty(8, device=CARD) + torch.empty(8, 1).expand(8, 8).to(CARD) + torch.zeros(8)


def test_real_values_stay():
    """What is made of real numbers alone keeps its values: grids and seeds are checked as ever. What DTensor makes to
    ask for shapes has none.
    """
    grid = torch.linspace(0, 1, 5)
    with card():
        assert bool((grid.diff() > 0).all()) and float(grid[-1]) == 1
        assert bool((grid.to(CARD) > 0).any()) is True  # no value: yes
        assert isinstance(torch.empty_strided((KB,), (1,)), FakeTensor) and not isinstance(grid, FakeTensor)


def test_norms_as_on_a_gpu():
    """Under autocast norms come out in float32, as on a GPU, and in bf16 without the fake card, as on a CPU."""
    h, norm = torch.zeros(2, 8, dtype=torch.bfloat16), torch.nn.LayerNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(h).dtype == torch.bfloat16
        with card():
            assert norm.to(CARD)(h.to(CARD)).dtype == torch.float32


def test_flops_are_pytorchs():
    """Linear layers, a convolution and attention with their gradients: PyTorch's own count, attention's by hand."""
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3, padding=1), torch.nn.Flatten(2), torch.nn.Linear(64, 32))
    x = torch.randn(2, 2, 4, 4, 4)
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    q = torch.randn(1, 2, 16, 8)
    with card() as ledger:
        net.to(CARD)(x.to(CARD)).sum().backward()
        assert sum(ledger.flops.values()) == counter.get_total_flops()
        assert set(ledger.flops) == {"linear", "convolution"}
        q = q.to(CARD).requires_grad_()
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert ledger.flops["attention"] == 4 * 2 * 16 * 16 * 8
    assert ledger.flops["attention backward"] == 2.5 * ledger.flops["attention"]


# ---- The phases at full width ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow():
    """Both phases of 1.3B on one GPU, three of its blocks, selective checkpointing."""
    return report.run(preset("1.3b", card_gb=80.0, layers=3), WAN["1.3b"], "1.3b", "a command", report.PHASES[:2])


@pytest.mark.parametrize("kind", report.NAMES)
def test_the_plan_is_what_is_counted(shallow, kind):
    """What the nets hold is the plan's to half a percent (of a bf16 teacher times, tables and norms are float32), FLOPs
    to 1 %, all memory to 10 %.
    """
    found, said = shallow["counted"][kind], report.planned(shallow)[kind]
    for term in ("weights", "gradients", "optimizer", "EMA"):
        assert said["memory"][term] == pytest.approx(found["memory"][term], rel=5e-3), term
    assert total(said) == pytest.approx(total(found), rel=0.1)
    for sort in ("linear", "attention", "attention backward"):
        assert said["flops"][sort] == pytest.approx(found["flops"].get(sort, 0), rel=5e-3), sort
    assert sum(said["flops"].values()) == pytest.approx(sum(found["flops"].values()), rel=0.01)


def test_eight_gpus():
    """Under FSDP2 the first of eight ranks holds an eighth of what the nets hold, and what it gathers is the plan's to
    20 %; its FLOPs are one GPU's.
    """
    record = report.run(preset("1.3b", gpus=8, card_gb=80.0, layers=3), WAN["1.3b"], "1.3b", "", ["stage1"])
    found, said = record["counted"]["stage1"], report.planned(record)["stage1"]
    for term in ("weights", "gradients", "optimizer", "EMA"):
        assert found["memory"][term] == pytest.approx(said["memory"][term], rel=5e-3), term  # some rows are padded
    assert said["memory"]["gathered"] == pytest.approx(found["memory"]["gathered"], rel=0.2)
    assert total(said) == pytest.approx(total(found), rel=0.1)
    assert found["flops"]["attention"] == pytest.approx(said["flops"]["attention"], rel=1e-3)


OTHERS = [{"lora": 16}, {"gpus": 4, "shard_over": 2}, {"gpus": 4, "context_parallel": 2}]
OTHERS += [{"gpus": 2, "offload_teacher": True}]


@pytest.mark.slow
@pytest.mark.parametrize("how", OTHERS, ids=lambda how: "-".join(how))
def test_other_ways_to_train(how):
    """LoRA, HSDP, context parallelism and a teacher on the host run through both phases; weights are the plan's."""
    record = report.run(preset("1.3b", card_gb=80.0, layers=3, **how), WAN["1.3b"], "1.3b", "", report.PHASES[:2])
    said = report.planned(record)
    for kind, found in record["counted"].items():
        for term in ("weights", "optimizer", "EMA"):
            assert said[kind]["memory"][term] == pytest.approx(found["memory"][term], rel=0.01), (kind, term)
        assert total(said[kind]) == pytest.approx(total(found), rel=0.15), kind


# ---- Sampling --------------------------------------------------------------------------------------------------------

SMALL = {"frames": 5, "height": 272, "width": 272}  # latents of 34 x 34, in tiles of 32 at 0 and 24


@pytest.fixture(scope="module")
def clip():
    """A small clip sampled with three blocks of 1.3B, the whole text encoder and the whole VAE."""
    return report.run(preset("1.3b", layers=3, **SMALL), WAN["1.3b"], "1.3b", "a command", ["sampling"])


def test_text_encoder_by_hand(clip):
    """UMT5-XXL's encoder in bf16 and one prompt of 512 tokens, to the byte and to the FLOP."""
    D, wide, blocks, n = 4096, 10240, 24, 512
    matrices, found = 4 * D * D + 3 * D * wide, clip["sampling"]["text encoder"]
    words, bias, norms = 256384 * D, 32 * 64, 2 * D
    assert found["memory"]["weights"] == 2 * (words + blocks * (matrices + bias + norms) + D)
    assert found["flops"] == {"linear": 2 * n * blocks * matrices, "attention": 4 * blocks * n * n * D}


def test_a_sample_keeps_its_prompt(clip):
    """M backbone and M N head evaluations, to the FLOP; text and its keys and values in all blocks are made once."""
    M, N, H, L, D = 2, 2, 2, 3, 1536
    part = flops(clip["config"], tokens(clip["config"], *SMALL.values()), H=H)
    keys, words, blocks = 4 * 512 * D * D, 2 * 512 * D * (4096 + D), M * (L - H) + M * N * H
    whole = {unit: M * part["backbone"][unit] + M * N * part["head"][unit] for unit in ("linear", "attention")}
    whole["linear"] -= (blocks - L) * keys + (M - 1) * words
    assert clip["sampling"]["student"]["flops"] == whole
    held = clip["sampling"]["student"]["memory"]["weights"]
    bf16 = report.planned_sampling(clip)["memory"]["weights"]
    assert bf16 < held < 1.1 * bf16  # times, tables and norms are float32, much of so few blocks


def test_the_vae_is_pytorchs(clip):
    """Wan2.1's VAE in float32: its convolutions as PyTorch counts them; in tiles (32 + 10)^2 / 34^2 of them, as they
    overlap.
    """
    from diffusers import AutoencoderKLWan

    found, tiled = clip["sampling"]["vae"], clip["sampling"]["vae, in tiles"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae = AutoencoderKLWan()
        vae.decode(torch.empty(1, 16, 2, 34, 34))
    assert found["memory"]["weights"] == 4 * sum(p.numel() for p in vae.parameters())
    assert found["flops"]["convolution"] == counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert tiled["flops"]["convolution"] == pytest.approx(found["flops"]["convolution"] * 42**2 / 34**2, rel=1e-9)
    assert tiled["memory"]["activations"] < found["memory"]["activations"]


def test_parts_by_hand():
    """Of a part called twice the higher peak counts, with what lay there before and without weights, and both calls'
    FLOPs.
    """
    with card() as ledger:
        pipe = SimpleNamespace(ledger=ledger, held={"student": 7}, found={})
        w, before = torch.empty(KB, KB, device=CARD), torch.empty(KB, KB, device=CARD)  # 4 MB each
        ledger.name([w], "weights")
        part = lambda rows: F.linear(torch.empty(rows, KB, device=CARD), w).sum()  # twice 4 KB a row
        Counted.clock(pipe, "head", part)(KB)
        Counted.clock(pipe, "backbone", part)(8)
        Counted.clock(pipe, "head", lambda: None)()  # of a student without a flow head
        assert before.device == CARD
    assert list(pipe.found) == ["student"] and pipe.found["student"]["flops"] == {"linear": 2 * (KB + 8) * KB * KB}
    assert pipe.found["student"]["memory"] == {"weights": 7, "activations": 3 * 4 * KB * KB}


# ---- What it says ----------------------------------------------------------------------------------------------------


@pytest.fixture
def record():
    """A record in which the optimizer of one kind of update is twice the plan's, and everything else the plan's."""
    settings = preset("1.3b", gpus=8).planned() | {"checkpointing": "full", "compiled": False}
    made = {"size": "1.3b", "gpus": 8, "lora": 0, "layers": 30, "settings": settings, "given": {}}
    made |= {"config": {**WAN["1.3b"], "patch_size": [1, 2, 2]}, "counted": dict.fromkeys(("stage1", "student"))}
    made |= {"date": "2026-01-01", "torch": "2", "command": "rehearse"}
    made["counted"] = {kind: found | {"seconds": 1.0} for kind, found in report.planned(made).items()}
    made["counted"]["student"]["memory"]["optimizer"] *= 2
    return made


def test_the_page_names_the_worst_term(record):
    """A row for each kind of update, with the term above 1 GB that is farthest off, and what was left out."""
    rows = [line.split(" | ") for line in report.markdown([record]).splitlines()[2:]]
    assert len(rows) == 2 and rows[0][4] == "+0.0%" and rows[1][5].startswith("optimizer: ")
    assert rows[1][5].endswith("(-50.0%)") and rows[0][0] == "| 1.3b, full; 8 GPUs"
    shallow = report.markdown([record | {"layers": 6, "given": {"shard_over": 4}}])
    assert "shard over 4, ONLY 6 blocks" in shallow


def test_sampling_on_the_page(record):
    """A row for each part and for all of them; the same clip of other GPUs adds none, a record without sampling none;
    tiles are another way to decode and no part of all.
    """
    parts = {name: {"memory": {"weights": 2**30, "activations": 2**i * 2**30}, "flops": {"linear": 1e12}, "seconds": 1}
             for i, name in enumerate(("text encoder", "student", "vae", "vae, in tiles"))}  # fmt: skip
    made = record | {"sampling": parts}
    page = report.sampling_markdown([record, made, made | {"gpus": 64}])
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()[2:]]
    assert [row[1] for row in rows] == ["text encoder", "student", "VAE", "VAE, in tiles", "together"]
    assert report.sampling_markdown([record]).count("\n") == 2
    assert rows[0][0] == "1.3b; 81 frames of 480x832, M = 2, N = 2" and rows[1][6].endswith("%")
    assert rows[-1][2:5] == ["3.00", "4.00", "7.0"] and "3.0" in rows[-1]
    said = report.text(made)
    assert "together                    3.00        4.00        7.00        3.00" in said and "by plan" in said
    assert report.label(made) == report.label(record) == "1.3b-8-gpus"
    assert report.label(made | {"counted": {}}) == "1.3b-8-gpus-sampling"


def test_the_command_prints_and_keeps(record, tmp_path, monkeypatch, capsys):
    """`rehearse` prints counted beside planned and what is not covered, and writes the record under a name that says
    what it is; blocks too few for the discriminator are refused in a sentence.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "run", lambda *_: record)
    assert run.main(["rehearse", "--preset", "1.3b", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert "all 30 blocks, on 8 GPUs" in said and "-50.0%" in said and report.NOT_COVERED in said
    assert json.loads((tmp_path / "runs/wan-rehearsal/1.3b-8-gpus.json").read_text()) == record
    assert report.label(record | {"layers": 6, "lora": 64}) == "1.3b-8-gpus-lora-64-6-blocks"
    with pytest.raises(ValueError, match="layers is 2; the discriminator sees 3 blocks"):
        report.shallow(preset("1.3b"), 2)
