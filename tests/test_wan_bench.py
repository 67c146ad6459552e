"""The benchmark of wan_scale/: every case runs on the tiny size, and its tables say what was measured and how far the
plan was off.
"""

import json

import pytest
import torch

pytest.importorskip("diffusers")
import test_wan_plan

from wan_scale import bench, run, speed
from wan_scale.config import preset
from wan_scale.cost import benchmarks
from wan_scale.cost.plan import plan
from wan_scale.cost.sizes import GB, WAN, discriminator
from wan_scale.cost.work import UNITS, flops, measured_rates, step_work, time_of
from wan_scale.rehearsal.card import card
from wan_scale.rehearsal.report import shallow

ON_A_CARD = {"forward, compiled", "sampling, graphed head", "stage 1, TF32", "stage 2, not compiled"}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("bench")
    found = bench.run(preset("tiny"), run.size_of("tiny"), "tiny", out, repeats=1)
    assert json.loads(next(out.glob("tiny-*.json")).read_text()) == json.loads(json.dumps(found))
    return found


def rows(lines, name=""):
    """Cells of the rows of a table whose first cell begins with `name`."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0].startswith(name)]


def test_every_case_is_measured(record):
    """Rates, forward, both stages by their real loops, sampling at every (M, N), stock calls, the naive baseline and
    the VAE: seconds.
    """
    cases = record["cases"]
    assert {name for name, case in cases.items() if "failed" in case} == ON_A_CARD  # the preset runs on the CPU
    assert {*UNITS} - {"attention", "attention backward"} < {*cases["rates"]["seconds"]} == {*cases["rates"]["work"]}
    assert {"native", "native, with backward"} <= {*cases["attention"]["seconds"]}
    for name in ("stage 2", "stage 2, naive", "stage 2, full checkpointing"):
        assert set(cases[name]["seconds"]) == {"student", "critic"}
    assert list(cases["sampling"]["seconds"]) == ["M1N2", "M1N1", "M1N4", "M2N2", "M4N1"]
    assert all(s > 0 for case in cases.values() if "failed" not in case for _, s, _ in benchmarks.measured(case))
    assert cases["stage 2, naive"]["checkpointing"] == "full" and cases["stage 2"]["checkpointing"] == "none"


def test_tables_of_a_run(record):
    """A row a number, its plan and its error beside it; the evaluations' effective NFE and the rates below."""
    text = benchmarks.markdown([record])
    table = rows(benchmarks.cases(record))[1:]
    assert len(table) == len(ON_A_CARD) + 3 * 2 + 2 + 5 + 2 + 1 and all(len(row) == 8 for row in table)
    (forward,) = rows(benchmarks.cases(record), "forward, stock call")
    work = step_work(record["config"], record["tokens"], "teacher", H=2)["teacher"]
    assert float(forward[2]) == pytest.approx(time_of(work, measured_rates(record)), rel=1e-3)
    assert float(forward[3].rstrip("%")) / 100 == pytest.approx(float(forward[2]) / float(forward[1]) - 1, abs=0.02)
    assert "| 1 | 2 | 1.50 |" in text and "within 15% for time" in text and "| weight gradients |" in text


def test_adapters_are_measured():
    """Where one GPU cannot train in full, stage 2 runs with LoRAs on a shared base: the same loop, adapters as the
    trained weights.
    """
    one = bench.Bench(preset("tiny", lora=4), run.size_of("tiny"), repeats=1)
    found = one.training("stage 2")
    assert found["lora"] == 4 and min(found["seconds"].values()) > 0
    # nothing is made before a case runs
    big = bench.Bench(preset("14b", device="cpu", card_gb=141), run.size_of("14b"))
    small = bench.Bench(preset("1.3b", device="cpu", card_gb=141), run.size_of("1.3b"))
    assert (big.lora, small.lora, small.mode) == (64, 0, "selective")


def test_only_what_is_grafted_has_memory(monkeypatch):
    """With adapters the benchmark's student is made of a frame without memory: beside the bf16 base there are, at the
    most, its own head, embeddings and new layers, never a float32 copy of the base; without adapters one copy of each.
    """
    config = run.size_of("tiny") | {"num_layers": 8, "ffn_dim": 1024}
    size = lambda net, keep=lambda name: True: sum(p.nbytes for name, p in net.named_parameters() if keep(name))
    for rank in (4, 0):
        one = bench.Bench(preset("tiny", lora=rank, taps="1,7"), config, repeats=1)
        base = bench.lora.adapt(one.network(torch.bfloat16), 4, 1.0, {"student": 6}) if rank else None
        with test_wan_plan.Peak() as made:
            student = one.student(base)
        whole, own = size(one.network(torch.float32)), size(student, lambda name: ".adapter." not in name)
        copied = size(student, lambda name: ".blocks." not in name) + sum(b.nbytes for b in student.buffers())
        assert made.peak < own + 2 * copied and (own + 2 * copied < 0.7 * whole if rank else own > whole)
        assert not any(p.is_meta or not p.isfinite().all() for p in student.parameters())
        assert not student.span.mlp[-1].weight.any() and student.net.blocks[-1].norm2.weight.eq(1).all()
    with test_wan_plan.Peak() as made:
        net = one.network(torch.bfloat16)
    assert made.peak < 1.1 * size(net)  # no float32 before it


class Clock:
    """Stands for the time module: every call is 0.25 s later, and work() says how long it took."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 0.25
        return self.now


def test_medians_leave_the_warm_up_out(monkeypatch):
    """The warm-up is not in the median and not in the time limit, however long it took; three are measured even if they
    take too long.
    """
    clock, took = Clock(), iter([100.0, 50.0, 1.0, 3.0, 2.0, 9.0, 9.0])

    def work():
        clock.now += next(took)

    monkeypatch.setattr(speed, "time", clock)
    cpu = torch.device("cpu")
    assert speed.median_seconds(work, cpu, repeats=3, warm=2, within=0.1) == (2.25, 3)  # 0.25 of it the clock's own
    took = iter([1.0] * 9)
    assert speed.median_seconds(work, cpu, repeats=5, warm=1) == (1.25, 5)
    assert speed.median_seconds(work, cpu, repeats=5, warm=0, within=4.0)[1] == 3


def test_training_steps_leave_the_first_out(monkeypatch):
    """Of the rounds the first of each kind, which compiles, is left out; with little time left two are made, with less
    none.
    """
    one = bench.Bench(preset("tiny"), run.size_of("tiny"), repeats=1)
    seconds = iter([60.0, 1.0, 50.0, 3.0, 2.0, 8.0, 4.0, 7.0])  # critic and student in turns
    monkeypatch.setattr(speed, "between", lambda start, end: next(seconds))
    found = one.training("stage 2")
    assert found["seconds"] == {"critic": 4.0, "student": 7.0} and found["n"] == 3
    monkeypatch.undo()
    for expected, rounds in ((100.0, 1), (60.0, 2), (1.0, 4)):
        monkeypatch.setattr(one, "expected", lambda *a, s=expected, **kw: s / 4)  # two kinds, two clips
        monkeypatch.setattr(one, "left", lambda: 199.0)
        if expected == 100.0:
            with pytest.raises(RuntimeError, match="left out: 200 s by plan, 199 s were left"):
                one.training("stage 2")
        else:
            assert one.training("stage 2")["n"] == rounds - 1  # after the first, which is the warm-up


def test_the_naive_baseline_is_naive(monkeypatch):
    """Eager blocks on native attention, full checkpointing, torch's default AdamW; the other as the run would be."""
    made, prepared, phase = [], [], bench.WanPhase.run
    monkeypatch.setattr(bench.WanPhase, "run", lambda self, *a, **kw: (made.append(self), phase(self, *a, **kw))[1])
    prepare = speed.prepare
    monkeypatch.setattr(speed, "prepare", lambda net, **kw: (prepared.append(kw), prepare(net, **kw))[1])
    one = bench.Bench(preset("tiny"), run.size_of("tiny"), repeats=1)
    for naive in (False, True):
        made.clear(), prepared.clear()
        one.training("stage 2", naive=naive)
        assert {group["fused"] for opt in made[0].optimizers.values() for group in opt.param_groups} == {
            None if naive else True
        }
        how = {"attn": "native", "compiled": False, "checkpointing": "full" if naive else "none"}
        assert prepared == [how] * 3  # student, teacher, fake score


def test_what_does_not_fit_the_time_is_left_out(record, monkeypatch):
    """By the rates measured before: samples that take longer than what is left are named, the others are measured."""
    one = bench.Bench(preset("tiny"), run.size_of("tiny"), repeats=1)
    assert one.expected("sample", "native", M=1, N=1) == 0  # no rates yet
    one.record = record
    short, long = (one.expected("sample", "native", M=M, N=N, compiled=False) for M, N in ((1, 4), (2, 2)))
    assert 0 < short < long and one.expected("stage1", "native", tf32=True) != one.expected("stage1", "native")
    monkeypatch.setattr(one, "left", lambda: 2 * (short + long))
    found = one.sampling()
    assert list(found["seconds"]) == ["M1N2", "M1N1", "M1N4"] and list(found["reasons"]) == ["M2N2", "M4N1"]
    assert "left out" in found["reasons"]["M4N1"] and "left out" in "".join(
        benchmarks.cases(record | {"cases": {"sampling": found}})
    )


def test_the_first_minutes_settle_what_matters(record, monkeypatch):
    """First the stock forward, then the update that needs the least memory, before anything is compiled or tuned. What
    the second takes is expected from the first; where two rounds would not fit in the time, one is made.
    """
    assert list(record["cases"])[:3] == [bench.FIRST, "stage 2, naive", "attention"]
    one = bench.Bench(preset("tiny"), run.size_of("tiny"), repeats=1)
    one.record = {"cases": {bench.FIRST: {"seconds": 7.0}}}
    assert one.expected("teacher", "native") == pytest.approx(7.0)
    critic, student = (one.expected(kind, "native", checkpointing="full") for kind in ("critic", "student"))
    assert 7 < critic < student < 20 * 7
    for left, rounds in ((10.0, 3), (2.2, 1), (1.2, 0)):  # of 4, 2 and 1: the first is the warm-up
        monkeypatch.setattr(one, "left", lambda left=left: left * one.cfg.micro_batch * (critic + student))
        found = one.training("stage 2", naive=True)
        assert found["n"] == rounds and min(found["seconds"].values()) > 0
    with pytest.raises(RuntimeError, match="left out"):
        one.training("stage 2")  # which would have to compile


def test_a_head_that_was_not_recorded_is_no_measurement():
    """On a CPU nothing is recorded: the case fails, and its seconds are not taken for a graph's."""
    one = bench.Bench(preset("tiny"), run.size_of("tiny"), repeats=1)
    with pytest.raises(RuntimeError, match="could not be recorded"):
        one.sampling(graphed=True, grids=((1, 1),))


def test_variants_have_files_of_their_own(tmp_path):
    """Another setting is in the command and in the name; no folder of this machine is."""
    cfg = preset("tiny", attn="native", tf32=True, out=str(tmp_path), bench_minutes=1e-9)
    found = bench.run(cfg, run.size_of("tiny"), "tiny", tmp_path)
    assert found["variant"] == ["tf32", "attn native"]
    assert all(row[3] == "not measured yet" for row in rows(benchmarks.bars([found | {"size": "1.3b"}]))[1:])
    assert found["command"].endswith("--preset tiny --tf32 --attn native --bench-minutes 1e-09")
    assert next(tmp_path.glob("*.json")).stem.endswith("-tf32-attn-native")


def test_a_case_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    """Out of memory or anything else in a case is a line of the record; the cases after it are measured."""

    def broken(self, kind, **_):
        raise (
            torch.OutOfMemoryError("no room")
            if kind == "stage 2"
            else TypeError("a backend of another version\nand its trace")
        )

    monkeypatch.setattr(bench.Bench, "training", broken)
    monkeypatch.setattr(bench, "GRIDS", ((1, 1), (1, 2)))
    found = bench.run(preset("tiny"), run.size_of("tiny"), "tiny", tmp_path, repeats=1)
    assert found["cases"]["stage 2"]["failed"] == "out of memory" and found["cases"]["sampling"]["seconds"]["M1N1"] > 0
    assert found["cases"]["stage 1"][
        "failed"
    ] == "a backend of another version" and "out of memory" in benchmarks.markdown([found])


def test_time_is_up(tmp_path):
    """No case starts after --bench-minutes, and each that did not says so in the file."""
    found = bench.run(preset("tiny", bench_minutes=1e-9), run.size_of("tiny"), "tiny", tmp_path, repeats=1)["cases"]
    left = {name for name, case in found.items() if case["failed"] == "left out: 0 s were left"}
    assert left == {*found} - ON_A_CARD


# ---- Tables of a made-up GPU: rates are known, so times are ---------------------------------------------------------


def made(**cases):
    """A record at 1.3B with the rates of test_wan_plan.made_record; cases may lack what all of them have."""
    extra = {"tf32": False, "micro_batch": 1, "H": 5, "N": 2, "last_tap": 29, "clip": [81, 480, 832], "torch": "2",
             "precision": "bfloat16", "command": "bench",
             "discriminator": discriminator(WAN["1.3b"], (21, 60, 104), 384)}  # fmt: skip
    record = test_wan_plan.made_record(**extra)
    record["cases"]["rates"]["seconds"]["matmul"], record["cases"]["rates"]["work"]["matmul"] = 1.0, 800e12
    facts = {"attn": "cudnn", "compiled": True, "checkpointing": "selective", "lora": 0, "difference": True}
    record["cases"] |= {name: case if "failed" in case else facts | case for name, case in cases.items()}
    return record


def test_prediction_errors():
    """Times fabricated from the rates are predicted without error; slower ones and larger peaks are counted as misses,
    at the bars.
    """
    n, D = 32760, 1536
    whole = flops(WAN["1.3b"], n)["whole"]
    forward = whole["linear"] / 700e12 + whole["attention"] / 600e12 + 30 * n * (42 * D + 4 * 8960) / 4e12
    native = whole["linear"] / 700e12 + whole["attention"] / 300e12 + 30 * n * (354 * D + 4 * 8960) / 4e12
    peak = (2 * 1_418_996_800 + n * (8 * D + 4 * 8960)) / GB
    record = made(**{
        "forward, compiled": {"seconds": forward, "peak_gb": peak / 1.09},
        "forward": {"seconds": forward / 1.16, "peak_gb": peak / 1.12},
        "forward, stock call": {"seconds": native, "peak_gb": peak, "attn": "native", "compiled": False},
        "stage 1": {"failed": "out of memory"},
        "VAE decode": {"seconds": 1.5, "peak_gb": 9.0},
    })  # fmt: skip
    table = benchmarks.cases(record)
    (compiled,), (stock,) = rows(table, "forward, compiled"), rows(table, "forward, stock")
    assert (
        compiled[3] == stock[3] == "+0%"
        and compiled[6] == "+9%"
        and stock[6] == "+0%"
        and rows(table, "forward")[1][3] == "+16%"
    )
    assert compiled[7].startswith("attention 7") and rows(table, "VAE")[0] == [
        "VAE decode",
        "1.5",
        "",
        "",
        "9.0",
        "",
        "",
        "",
    ]
    assert rows(table, "stage 1")[0][1] == "out of memory"
    assert table[-1] == "The plan's errors are within 15% for time: 2 of 3 rows, within 10% for memory: 2 of 3 rows."


@pytest.mark.parametrize(
    "case, part, kind", [("stage 1", "", "stage1"), ("stage 2", "student", "student"), ("stage 2", "critic", "critic")]
)
def test_prediction_of_training(case, part, kind):
    """Each training step's prediction is plan's own seconds and bytes of one clip at these rates, in the mode that it
    ran in.
    """
    record = made(**{case: {"seconds": {part: 1.0}}})
    spent, peak = benchmarks.predicted(record, case, part)
    held = {"compiled": True, "checkpointing": "selective", "disc_checkpointing": True, "batch": 1, "gpus": 1}
    p = plan("1.3b", rates=measured_rates(record), flow_map_share=1.0, **held)
    assert sum(spent.values()) == pytest.approx(p["seconds"][kind]) and peak == pytest.approx(p["peak"][kind])
    record["cases"][case]["difference"] = False
    assert (sum(benchmarks.predicted(record, case, part)[0].values()) < sum(spent.values())) == (kind == "stage1")


def test_bars():
    """Each bar is met, or missed by so much, or not measured yet; a variant with more memory than the naive one counts
    if it is alone.
    """
    stage2 = lambda s, gb, **kw: {
        "seconds": {"student": s, "critic": s},
        "peak_gb": {"student": gb, "critic": 50.0},
        **kw,
    }
    record = made(**{
        "forward, compiled": {"seconds": 0.5},
        "sampling": {"seconds": {"M1N1": 0.5, "M1N2": 0.66, "M1N4": 0.75}},
        "stage 2": stage2(2.0, 72.0), "stage 2, full checkpointing": stage2(2.5, 60.0),
        "stage 2, naive": stage2(4.0, 60.0), "stage 1": {"seconds": {"": 4.0}},
        "stage 1, no finite difference": {"failed": "out of memory"},
    })  # fmt: skip
    table = [(row[1], row[3].split(",")[0], row[4]) for row in rows(benchmarks.bars([record]))[1:]]
    assert table == [
        ("forward, share of the GPU's bf16 matmul rate", "71%", "met"),
        ("stage 2 iteration against the naive baseline, at equal memory", "1.60x (60.0 GB against 60.0 GB)", "met"),
        ("stage 2 at batch 1, peak memory", "72.0 GB", "met"),
        ("sample at M = 1, N = 2, transformer", "0.660 s", "missed by 10% of the bound"),
        ("sample at M = 1, N = 2, transformer", "not measured yet", ""),
        ("inner steps over (N-1) H / L, above it", "0%", "met"),
        ("finite difference, added to a stage 1 step, mean of one GPU", "not measured yet", ""),
    ]
    record["cases"]["stage 1, no finite difference"] = {"seconds": {"": 2.5}}
    assert rows(benchmarks.bars([record]))[7][3].startswith("15% (to a step that needs it 60%)")
    del record["cases"]["stage 2, full checkpointing"]
    alone = rows(benchmarks.bars([record]))[2]
    assert (
        alone[3].startswith("2.00x (72.0 GB against 60.0 GB, NOT AT EQUAL MEMORY)") and alone[4] == "met in time alone"
    )
    assert all(row[3] == "not measured yet" for row in rows(benchmarks.bars([]))[1:])
    (nfe,) = [row for row in rows(benchmarks.evaluations(record)) if row[:2] == ["1", "4"]]
    assert nfe[2:5] == ["1.50", "0.75", "1.50"]


def test_published_benchmarks_are_the_files():
    """BENCHMARKS.md is what publish writes from bench_results/; without a file it lists what waits."""
    from results import publish

    assert (bench.RESULTS.parent / "BENCHMARKS.md").read_text() == publish.benchmarks()
    assert "Not measured yet" in benchmarks.markdown([]) and "| 14b |" in benchmarks.markdown([])


@pytest.mark.slow
@pytest.mark.parametrize("size, lora", [("1.3b", 0), ("14b", 64)])
def test_cases_on_a_fake_card(size, lora):
    """At full width, three blocks deep, on tensors without memory: no shape, type or device stops a case of the bench.
    Not those that time kernels, and no CUDA graph.
    """
    cfg = shallow(preset(size, attn="native", compile="off", bench_minutes=1e6, lora=lora), 3)
    config = WAN[size] | {"num_layers": 3}
    with card():
        made = bench.Bench(cfg, config, repeats=1)
        cases = {name: work for name, (work, _) in made.cases().items() if name not in ("attention", "rates")}
        del cases["sampling, graphed head"]
        assert made.lora == lora and len(cases) > 8
        for name, work in cases.items():
            found = work()
            assert found["seconds"] and not found.get("reasons"), name
