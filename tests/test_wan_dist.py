"""Weights over many ranks: nobody holds more than it keeps, two copies of the weights are one, the head is gathered
once, an offloaded teacher says the same."""

import json
import shutil

import pytest
import torch

import tmd_minimal as tmd

pytest.importorskip("diffusers")
import wan_ranks
import worlds
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_wan_train import assert_same_run
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import CommDebugMode

from wan_scale.config import preset
from wan_scale.data.teacher import generate
from wan_scale.model import WanNetwork, load_transformer
from wan_scale.tiny import make_tiny
from wan_scale.training import dist, students, train, weights
from wan_scale.training.phase import Feed, WanPhase

FOUR = {"global_batch": 8}  # on four ranks two micro-batches an update
SHARDED = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny folder, its transformer again in files of 100 kB, and four clips."""
    root = tmp_path_factory.mktemp("wan")
    make_tiny(root / "tiny")
    shutil.copytree(root / "tiny", root / "cut", ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors"))
    load_transformer(root / "tiny").save_pretrained(root / "cut" / "transformer", max_shard_size="100KB")
    (root / "prompts.txt").write_text("a red ball\na blue cube\na green cat runs\na small dog\n")
    generate(root / "tiny", root / "prompts.txt", root / "data", frames=9, height=64, width=64, steps=2, shard_size=4)
    return root


@pytest.fixture(scope="module")
def pair(world):
    """What each of two ranks found."""
    worlds.launch(2, wan_ranks.pair, world)
    return [torch.load(world / f"pair-{rank}.pt", weights_only=True) for rank in (0, 1)]


def settings(world, out, **more):
    return wan_ranks.settings(world, out, **more)


def assert_equal(a: dict, b: dict) -> None:
    """The same names with the same bits."""
    assert a.keys() == b.keys()
    assert all(torch.equal(x, b[name]) and x.dtype == b[name].dtype for name, x in a.items())


# ---- Start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folder", ["tiny", "cut"])
def test_filled_skeleton_is_from_pretrained(world, folder, dtype):
    """Weights, buffers, dtypes and config of a filled skeleton are from_pretrained's to the last bit, from one file and
    from many.
    """
    assert (world / "cut" / "transformer" / SHARDED).exists() and not (
        world / "tiny" / "transformer" / SHARDED
    ).exists()
    stock, net = load_transformer(world / folder, dtype), weights.skeleton(world / folder, dtype)
    weights.fill(net, "cpu", weights.files(world / folder / "transformer"))
    assert_equal(dict(stock.named_parameters()), dict(net.named_parameters()))
    assert_equal(dict(stock.named_buffers()), dict(net.named_buffers()))
    plain = lambda config: {key: value for key, value in config.items() if not key.startswith("_")}
    assert plain(net.config) == plain(stock.config) and net.training == stock.training
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("fusion", ["gated", "concat"])
@pytest.mark.parametrize("lora", [0, 4])
def test_student_starts_as_it_did(world, tmp_path, fusion, lora):
    """A student made without its blocks' weights and filled is the one made of the loaded transformer at the same seed,
    bit for bit.
    """
    cfg = settings(world, tmp_path, fusion=fusion, lora=lora, seed=3)
    base = train.shared_base(cfg, cfg.how(), torch.device("cpu"))
    student = train.make_student(cfg, cfg.how(), base=base)
    weights.fill(student, "cpu")
    tmd.seed_everything(cfg.seed)
    before = tmd.TMDStudent(WanNetwork(load_transformer(world / "tiny")), cfg.H, fusion).state_dict()
    own = {name: p for name, p in student.state_dict().items() if ".adapter." not in name}
    assert_equal(own, {name: p for name, p in before.items() if name in own})
    assert len(own) == len(before) or lora


def test_no_block_has_memory_before_it_is_sharded(world, tmp_path, monkeypatch):
    """Until Training.place, student, teacher and fake score hold what is outside the blocks and the student's new
    layers; from_pretrained is never called."""
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", None)
    cfg, seen, place = settings(world, tmp_path, stage1_updates=1, stage2_iterations=1), [], train.Training.place

    def look(job, net):
        with_memory = {name for name, p in net.named_parameters() if not p.is_meta}
        seen.append((wan_ranks.held(net), {name for name in with_memory if ".blocks." in name}))
        return place(job, net)

    monkeypatch.setattr(train.Training, "place", look)
    train.stage1(cfg)
    train.stage2(cfg)
    rest = wan_ranks.held(weights.skeleton(world / "tiny"))
    new = sum(
        p.nbytes for name, p in train.make_student(cfg, cfg.how()).named_parameters() if not name.startswith("net.")
    )
    # student; student, teacher, fake score
    assert seen == [(rest + new, set()), (rest + new, set()), (rest, set()), (rest, set())]


def test_base_of_adapters_is_alone(world, tmp_path):
    """With --lora the student brings its last H blocks, without memory until they are filled, and none of those that it
    shares.
    """
    cfg = settings(world, tmp_path, lora=4)
    student = train.make_student(cfg, cfg.how(), base=train.shared_base(cfg, cfg.how(), torch.device("cpu")))
    own = {name for name, p in student.named_parameters() if p.is_meta}
    assert {name.split(".")[3] for name in own} == {"2", "3"} and all(
        name.startswith("net.transformer.blocks.") for name in own
    )


def test_a_rank_holds_its_half(world, pair):
    """Two ranks: before sharding each holds what is outside the blocks; afterwards both together hold every weight
    once, and neither has read more than its own rows of a tensor."""
    cfg = settings(world, world / "held")
    student, teacher = train.make_student(cfg, cfg.how()), train.network(cfg)
    for who, net in (("student", student), ("teacher", teacher)):
        whole = sum(p.numel() * 4 for p in net.parameters())
        assert [rank["held"][who][0] for rank in pair] == [wan_ranks.held(net)] * 2
        assert sum(rank["held"][who][1] for rank in pair) == whole
        assert max(rank["held"][who][1] for rank in pair) < 0.52 * whole  # one row of a table of one row is all of it
        assert [rank["held"][who][2] for rank in pair] == [max(p.numel() * 4 for p in net.parameters()) / 2] * 2


def test_only_the_first_rank_keeps_what_is_gathered(pair):
    """dist.whole gives the others nothing to hold."""
    assert all(rank["whole"] for rank in pair)


def bad_folder(world, place, change):
    """A copy of the folder whose transformer file was changed by change(tensors)."""
    shutil.copytree(world / "tiny", place)
    file = place / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return place


def test_files_that_do_not_fit(world, tmp_path):
    """A tensor too few, one too many, one of another shape, a cut and a missing file are a sentence each, before
    anything is filled.
    """
    first = "blocks.0.attn1.to_q.weight"
    changes = {
        "no": (lambda tensors: tensors.pop(first), rf"{first} is not there\)"),
        "more": (lambda tensors: tensors.update(another=torch.zeros(2)), r"another has no place\)"),
        "shape": (lambda tensors: tensors.update({first: torch.zeros(2, 3)}), rf"{first} is of shape \(2, 3\)\)"),
        "two": (lambda tensors: [tensors.update({k: torch.zeros(1)}) for k in sorted(tensors)[:2]], "and 1 more"),
    }
    for name, (change, words) in changes.items():
        with pytest.raises(
            RuntimeError, match=rf"does not hold the weights of this network \(.*{words}.*; give the folder that"
        ):
            train.network(settings(world, tmp_path, model=str(bad_folder(world, tmp_path / name, change))))
    ignored = bad_folder(
        world,
        tmp_path / "ignored",
        lambda tensors: tensors.update({"blocks.0.attn2.norm_added_q.weight": torch.ones(48)}),
    )
    weights.skeleton(ignored)  # diffusers ignores it as well
    file = tmp_path / "no" / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="is missing or damaged; fetch or make it again"):
        weights.skeleton(tmp_path / "no")


def test_student_of_another_shape(world, tmp_path):
    """A finished student that is not of this network is refused in a sentence, and one of fewer weights, too."""
    cfg = settings(world, tmp_path)
    student = weights.fill(train.make_student(cfg, cfg.how()), "cpu")
    state = {name: p.clone() for name, p in student.state_dict().items()}
    with pytest.raises(RuntimeError, match="holds no finished student"):
        students.load_student(tmp_path, student)
    save_file({name: p for name, p in state.items() if name != "gate"}, tmp_path / "student.safetensors")
    with pytest.raises(RuntimeError, match=r"\(gate is not there\)"):
        students.load_student(tmp_path, student)
    save_file({name: p + 1 for name, p in state.items()}, tmp_path / "student.safetensors")
    students.load_student(tmp_path, student)
    assert_equal(weights.fill(student, "cpu").state_dict(), {name: p + 1 for name, p in state.items()})


# ---- Copies of the weights -------------------------------------------------------------------------------------------


@pytest.mark.slow  # four ranks; two ranks stand in for them in the default suite
def test_two_copies_equal_one_process(world, tmp_path):
    """HSDP on 2 x 2 gloo ranks and one process with eight micro-batches do the same stage 1 and stage 2; a run begun on
    2 x 2 goes on as one row of four and in one process, to the same end."""
    for name in ("tiny", "data"):
        (tmp_path / name).symlink_to(world / name)
    worlds.launch(4, wan_ranks.copies, tmp_path)
    copies = torch.load(tmp_path / "copies.pt", weights_only=True)
    for phase in ("stage1", "stage2"):
        one = wan_ranks.run(phase, tmp_path, tmp_path / "one", **FOUR)
        assert (one["world"], copies[phase]["world"], copies[phase]["mesh"]) == (1, 4, [2, 2])
        assert_same_run(one, copies[phase])
    assert_same_run(one, copies["row"])
    assert copies["row"]["mesh"] == [4]
    assert_same_run(one, wan_ranks.run("stage2", tmp_path, tmp_path / "begun-for-one", **FOUR))
    steps = [[len(found["losses"]) for found in (one, copies["row"])], copies["row"]["step"]]
    assert steps == [[6, 3], 6]  # the second half only


@pytest.fixture
def four_ranks():
    """This process as the first of four whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.stop()


def test_copies_are_reduced_once_an_update(four_ranks, monkeypatch):
    """Of three micro-batches two leave the blocks' gradients with the ranks that share a copy; the last sums over the
    copies, once for every sharded part, before the optimizer steps. (The slow test above compares the sums.)
    """
    over_copies, real = [], torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a, **kw: (over_copies.append(kw), real(*a, **kw))[1])
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(3)))
    net.blocks = list(net)[:2]  # the third is the root's
    net, seen = dist.shard(net, shard_over=2), []
    made = WanPhase("p", {"net": net}, "net", 1e-3, 0.9, 0, {}, feed=Feed(None), accumulate=3)
    step = made.optimizers["net"].step
    monkeypatch.setattr(made.optimizers["net"], "step", lambda: (seen.append(net[1].weight.grad is not None), step()))
    for micro in range(3):
        made.begin(micro)
        over_copies.clear()
        made.update("net", {"loss": net(torch.ones(1, 4)).sum()})
        assert len(over_copies) == (1, 1, 3)[micro], "the root's gradients are of other layers in each call: summed"
    assert seen == [True]


def test_weights_are_looked_at_where_they_are(four_ranks, monkeypatch):
    """Each rank reads its part of a sharded net and reduces nothing; what one rank finds, all of them say."""
    net, told = torch.nn.Linear(4, 4), []
    net.blocks = []
    net = dist.shard(net)
    monkeypatch.setattr(dist, "gathered", lambda value: (told.append(value), [["bias"], value])[1])
    with CommDebugMode() as reduced, pytest.raises(RuntimeError, match=r"here holds .* not finite \(bias\); make or"):
        weights.check_finite(net, "here")
    assert told == [[]] and not reduced.get_total_counts()
    dist.local(net.weight).data[0, 1] = float("nan")
    with pytest.raises(RuntimeError, match=r"\(bias, and 1 more\)"):
        weights.check_finite(net, "here")
    assert told[1] == ["weight"]
    monkeypatch.setattr(dist, "gathered", None)  # whole nets, as in sampling, where a rank may have nothing to do
    weights.check_finite(torch.nn.Linear(2, 2), "here")


def test_copies_that_do_not_divide():
    """shard_over must divide the ranks."""
    with pytest.raises(ValueError, match="shard_over 8 does not divide 1 processes; start a multiple of 8, or give 0"):
        dist.shard(torch.nn.Linear(1, 1), shard_over=8)


# ---- What is gathered, and when --------------------------------------------------------------------------------------


def test_head_is_gathered_once_a_micro_batch(pair):
    """N = 4, two micro-batches: the head's blocks and the root are gathered twice an update, not four times and more,
    forward and backward together; a block of the backbone once a call and once a backward pass."""
    # stage 1 calls it twice; the fifth is the student's
    for phase, backbone in (("stage1", [6, 6, 6]), ("stage2", [2, 2, 2, 2, 4])):
        for rank in pair:
            found = rank["counts"][phase]["gathers"]
            assert [update["student 0"] for update in found] == [update["student 1"] for update in found] == backbone
            assert all(update[f"student {part}"] == 2 for update in found for part in ("2", "3", "rest"))
    fake_and_teacher = [update["other 3"] for update in pair[0]["counts"]["stage2"]["gathers"]]
    # critics: 1 + 1 of the fake score, 2 taps; student: 1, 2 of guidance, 1 + 1 of taps
    assert fake_and_teacher == [8, 8, 8, 8, 10]


def test_ranks_agree(pair):
    """On what the first one says."""
    assert [rank["agreed"] for rank in pair] == [0, 0]


def test_blocks_are_fetched_early(pair):
    """Each block of the teacher fetches the next, forward, and the one before, backward; the last tap is the last;
    --offload-teacher is.
    """
    for rank in pair:
        for wired, offloaded in zip(rank["wiring"], (False, True)):
            assert wired == {
                "forwards": [[1], [2], [3], []],
                "backwards": [[], [0], [1], [2]],
                "waits": [offloaded] * 4,
            }


def test_nothing_is_fetched_for_nobody(world, tmp_path, pair):
    """Taps that end at block 1 of 4 gather two blocks, leave no gather under way, and give the input its gradient."""
    net = WanNetwork(load_transformer(world / "tiny")).requires_grad_(False)
    x, c = torch.ones(1, 16, 3, 8, 8, requires_grad=True), torch.ones(1, 20, 32)
    net.taps(x, torch.tensor([0.7], dtype=torch.float64), c, (0, 1))[1].sum().backward()
    for rank in pair:
        assert rank["taps"]["pending"] == [] and rank["taps"]["gathers"].keys() == {"other rest", "other 0", "other 1"}
        torch.testing.assert_close(rank["taps"]["gradient"], x.grad, rtol=1e-5, atol=1e-6)


# ---- The teacher in host memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_offloaded_teacher_on_two_ranks(world, pair, precision):
    """Losses, weights, moments and EMA are the same bits with the teacher in host memory; the GAN term reaches the
    student.
    """
    if precision != "bf16":  # that of `pair`
        worlds.launch(2, wan_ranks.offloads, world, precision)
    for rank in (0, 1):
        found = torch.load(world / f"offloads-{precision}-{rank}.pt", weights_only=True)
        here, host = found["here"], found["host"]
        assert here["losses"] == host["losses"] and abs(here["losses"][4]["gan"]) > 0
        assert_equal(here["tensors"], host["tensors"])


@pytest.mark.parametrize(
    ("precision", "checkpointing"),
    [
        ("fp32", "none"),
        ("bf16", "full"),
        pytest.param("fp32", "full", marks=pytest.mark.slow),
        pytest.param("bf16", "none", marks=pytest.mark.slow),
    ],
)
def test_offloaded_teacher_in_one_process(world, tmp_path, monkeypatch, precision, checkpointing):
    """So it is without torchrun: the teacher alone is wrapped, and frozen. Critics and losses are the same bits, and
    the student's gradient is the same to the rounding of sums, whose order FSDP's hooks change."""
    kept, train_stage2 = [], tmd.train_stage2
    monkeypatch.setattr(
        tmd, "train_stage2", lambda *nets, **kw: kept.append((nets, kw["fake_score"])) or train_stage2(*nets, **kw)
    )
    how = {
        "stage1_updates": 0,
        "stage2_iterations": 5,
        "precision": precision,
        "checkpointing": checkpointing,
    }  # the fifth is the student's
    here = wan_ranks.run("stage2", world, tmp_path / "here", **how)
    try:
        host = wan_ranks.run("stage2", world, tmp_path / "host", offload_teacher=True, **how)
    finally:
        dist.stop()
    norms = [found["losses"][4].pop("gradient norm student") for found in (here, host)]
    assert here["losses"] == host["losses"] and norms[1] == pytest.approx(norms[0], rel=1e-3)
    of_critics = [
        {name: p for name, p in found["tensors"].items() if name[:4] in ("fake", "disc")} for found in (here, host)
    ]
    assert_equal(*of_critics)
    for name, x in here["tensors"].items():
        if name.startswith("student.") and name.endswith(".exp_avg"):
            tolerance = 1e-4 if precision == "fp32" else 5e-2  # most seen: 4.2e-5 and 1.3e-2
            assert (x - host["tensors"][name]).abs().max() <= tolerance * x.abs().max() + 1e-9, name
    (student, teacher, *_), fake = kept[1]
    assert [isinstance(net, FSDPModule) for net in (student, teacher, fake, kept[0][0][1])] == [
        False,
        True,
        False,
        False,
    ]
    assert not any(p.requires_grad for p in teacher.parameters())
    facts = [json.loads((tmp_path / name / "stage2" / "student.json").read_text()) for name in ("here", "host")]
    own = ("sha256", "seal")  # of weights that are equal to rounding only
    same = [{key: value for key, value in f.items() if key not in own} for f in facts]
    assert same[0] == same[1]  # where the teacher was is no other run


def test_offload_and_adapters():
    """With --lora the teacher is the shared base."""
    with pytest.raises(ValueError, match="the base that all share and stays on the GPU; drop --offload-teacher"):
        preset("tiny", lora=4, offload_teacher=True)
