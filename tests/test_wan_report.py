"""report.html of a run: what the folder holds is what it shows, it is bounded, and it never ends a training."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from browser import needs_browser, opened

from wan_scale import run
from wan_scale.config import preset
from wan_scale.cost.plan import plan
from wan_scale.cost.sizes import GB, WAN
from wan_scale.pages import run_page
from wan_scale.pictures import contact_sheet
from wan_scale.training import kept, watch

STEADY = {"motion": 0.9, "contrast": 1.0, "peak": 1.1, "diversity": 0.8}


def facts_of(page) -> dict:
    return json.loads(page.read_text(encoding="utf-8").split("const facts = ", 1)[1].split(";\n", 1)[0])


def lines_of(steps: int) -> list[dict]:
    """A log: ten seconds an update, later twenty; a preview each 100 updates, an alarm at 100."""
    found = [{"step": 1, "memory": {"update": "stage1", "allocated_gb": gb}} for gb in (61.0, 60.0)]
    for step in range(10, steps + 1, 10):
        seconds = 10.0 * step + 10.0 * max(0, step - steps // 2)
        line = {"step": step, "tm_mf": 0.5, "gradient norm student": 1.0}
        found.append({**line, "seconds": seconds, "skipped": 1})
        if step % 100 == 0:
            found.append({"step": step, "preview": STEADY})
        if step == 100:
            found.append({"step": step, "alarm": "clips hardly move (23% of the data's motion): </script> & more"})
    return found


@pytest.fixture
def folder(tmp_path):
    """OUT of a stage 1 at update 400 of 1000, with two previews and a plan of 8 seconds an update."""
    stage = tmp_path / "run" / "stage1"
    (stage / "previews").mkdir(parents=True)
    (stage / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(400)), encoding="utf-8")
    for step, value in ((100, 0.2), (400, 0.8)):
        frames = np.full((4, 24, 40, 3), value)
        contact_sheet([("", "prompt 0", frames)], stage / "previews" / f"step-{step:08d}.png", columns=2)
    told = {"updates": 1000, "machine": "8 x GPU", "seconds": 8.0, "GB": 70.0, "by": "400 TFLOP/s (--tflops)"}
    (stage / "plan.json").write_text(json.dumps(told), encoding="utf-8")
    return tmp_path / "run"


def test_the_page_says_what_the_folder_holds(folder, capsys):
    """Updates, seconds per update so far and lately beside the plan's, memory, alarms, previews; from the command."""
    assert run.main(["report", str(folder)]) == 0 and str(folder / "report.html") in capsys.readouterr().out
    (phase,) = facts_of(folder / "report.html")["phases"]
    assert (phase["updates"], phase["target"], phase["finished"], phase["skipped"]) == (400, 1000, False, 1)
    assert (phase["seconds"], phase["each"], phase["pace"]) == (6000.0, 15.0, pytest.approx(20.0))
    assert phase["GB"] == 61.0 and phase["plan"]["GB"] == 70.0
    assert phase["alarms"] == [[100, "clips hardly move (23% of the data's motion): </script> & more"]]
    assert [one["step"] for one in phase["previews"]] == [100, 400] and phase["previews"][1]["numbers"] == STEADY
    curves = {curve["name"]: curve for curve in phase["curves"]}
    assert list(curves)[:4] == [*STEADY] and curves["motion"]["level"] == 1.0
    assert curves["seconds per update"]["level"] == 8.0 and curves["seconds per update"]["points"][-1][2] == 20.0
    assert "need not fall" in curves["tm_mf"]["hint"] and "no trend" in curves["gradient norm student"]["hint"]
    assert (folder / "report.html").read_text(encoding="utf-8").count("</script>") == 1


def test_it_loads_itself_anew_until_the_phase_is_finished(folder):
    """The page reloads while student.json is missing, or older than the log; then no more."""
    anew = lambda: 'http-equiv="refresh"' in run_page.write(folder).read_text(encoding="utf-8")
    assert anew()
    kept.write(folder / "stage1" / "student.json", {"updates": 300})  # a finished phase that goes on to more updates
    assert anew()
    kept.write(folder / "stage1" / "student.json", {"updates": 1000})
    assert not anew() and facts_of(folder / "report.html")["phases"][0]["updates"] == 1000


@needs_browser
def test_the_page_in_a_browser(folder):
    """Curves are drawn, the slider shows the pictures in turn, the pointer reads a value, a phone's width suffices."""
    with opened(run_page.write(folder)) as page:
        assert page.js("document.querySelectorAll('svg polyline').length") == 7
        picture = "document.querySelector('img')"
        page.wait(f"{picture}.naturalWidth > 0 && {picture}.src.endsWith('stage1/previews/step-00000400.png')")
        page.choose("input[type=range]", "0")
        page.wait(f"{picture}.naturalWidth > 0 && {picture}.src.endsWith('stage1/previews/step-00000100.png')")
        page.call("Page.reload")
        page.wait(f"document.readyState === 'complete' && {picture}.src.endsWith('step-00000100.png')")  # where one was
        text = page.js("document.body.innerText")
        for words in ("15 (lately 20)", "not finished", "100 min", "3.33 h", "update 100: clips hardly move"):
            assert words in text, words
        page.js("document.querySelector('svg').scrollIntoView()")
        box = page.js("(({left, top}) => [left, top])(document.querySelector('svg').getBoundingClientRect())")
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + 60, y=box[1] + 40)
        assert "at update 100" in page.js("document.querySelector('figcaption').innerText")
        for width in (1280, 390):
            page.size(width)
            assert page.fits()
        assert page.errors == [] and page.asked == []


def test_a_long_log_is_bounded_and_loses_no_spike_nor_alarm(folder, monkeypatch):
    """Of a long log neighbouring lines are read, with all previews and alarms; of many points the extremes stay."""
    points = [(i, 100.0 if i == 777 else 1.0) for i in range(100_000)]
    found = run_page.thinned(points)
    assert len(found) <= run_page.POINTS and max(high for *_, high in found) == 100.0 and found[-1][0] == 99_999
    monkeypatch.setattr(run_page, "LINES", 42)  # every 48th pair: every 48th line would be the student's alone
    log = folder / "stage1" / "log.jsonl"
    lines = []
    for step in range(1, 2001):
        lines.append({"step": step, "vsd" if step % 2 else "fake": 1.0, "seconds": 1.0 * step})
        rare = [{"alarm": "a"}, {"preview": STEADY}, {"memory": {}}, {"alarm": "b"}]
        lines += [{"step": step, **values} for values in rare] * (step % 500 == 0)
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    read = run_page.read_log(log)
    count = {key: sum(key in line for line in read) for key in ("alarm", "preview", "memory", "vsd", "fake")}
    assert len(read) <= 58 and (count["alarm"], count["preview"], count["memory"]) == (8, 4, 4)
    assert min(count["vsd"], count["fake"]) > 15


def test_broken_lines_and_numbers_are_left_out(folder):
    """A line cut by a kill, one that is no object and numbers that are not finite: the page is whole and valid."""
    log = folder / "stage1" / "log.jsonl"
    bad = [{"step": 410, "tm_mf": math.nan, "gradient norm student": math.inf, "seconds": math.nan}]
    text = "".join(json.dumps(line) + "\n" for line in bad) + '[1]\n{"step": "x"}\n{"step": 420, "tm_m'
    with open(log, "a", encoding="utf-8") as file:
        file.write(text)
    run_page.write(folder)
    (phase,) = facts_of(folder / "report.html")["phases"]
    assert phase["updates"] == 400 and all(math.isfinite(v) for c in phase["curves"] for p in c["points"] for v in p)


def test_a_folder_without_a_log_is_a_sentence(tmp_path, capsys):
    """And leaves no page. A run whose other files are damaged is shown as far as it is known."""
    assert run.main(["report", str(tmp_path)]) == 1
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "log.jsonl").write_text('{"step": 1, "tm_mf": 0.5, "seconds": 1.0}\n', encoding="utf-8")
    assert [f.name for f in tmp_path.iterdir()] == ["stage1"]
    assert "holds no log of a training; give the folder" in capsys.readouterr().err
    for name in ("student.json", "plan.json"):
        (tmp_path / "stage1" / name).write_text("{", encoding="utf-8")
    assert run.main(["report", str(tmp_path)]) == 0
    (phase,) = facts_of(tmp_path / "report.html")["phases"]
    assert phase["updates"] == 1 and not phase["finished"] and phase["plan"] == {}


def test_it_never_ends_a_training(tmp_path, monkeypatch, capsys):
    """An error of any kind is one line, another rank writes nothing, and nothing half written stays."""
    cfg = preset("tiny", out=str(tmp_path))
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "log.jsonl").write_text('{"step": 1, "tm_mf": 0.5, "seconds": 1.0}\n', encoding="utf-8")
    monkeypatch.setattr(run_page, "TEMPLATE", tmp_path / "gone.html")
    seen = watch.Watch(cfg, "stage1", torch.device("cpu"), {}, 12)
    seen.step(1)
    monkeypatch.setattr(run_page, "phase", lambda folder: {}["a bug"])
    seen.step(10)
    told = capsys.readouterr().out
    assert told.count("report.html is left out") == 2 and "the training goes on" in told and "a bug" in told
    monkeypatch.undo()
    monkeypatch.setattr(watch.dist, "rank", lambda: 1)
    seen.step(20)
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["log.jsonl", "plan.json", "stage1"]
    monkeypatch.undo()
    seen.step(30)
    assert facts_of(tmp_path / "report.html")["phases"][0]["target"] == 12


def test_when_it_is_written(tmp_path, monkeypatch):
    """At the first update, at each checkpoint and preview, and after save_minutes; not at each update."""
    cfg, written, now = preset("tiny", out=str(tmp_path), save_every=4, preview_every=6), [], [0.0]
    (tmp_path / "stage1").mkdir()
    monkeypatch.setattr(watch, "show", lambda cfg, name: written.append(step))
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    seen = watch.Watch(cfg, "stage1", torch.device("cpu"), {}, 30)
    for step in range(1, 15):
        now[0] += 60 * cfg.save_minutes + 1 if step == 10 else 1
        seen.step(step)
    assert written == [1, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("name", ["stage1", "stage2", "kd", "dmd2v"])
def test_the_plan_beside_the_log_is_the_plan(tmp_path, monkeypatch, name):
    """On a GPU: seconds and memory are those of `plan` for this phase, these GPUs and this checkpointing."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(WAN["1.3b"]), encoding="utf-8")
    cfg = preset("1.3b", model=str(tmp_path), out=str(tmp_path / "out"))
    gpu = SimpleNamespace(total_memory=80 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(watch.dist, "world", lambda: 8)
    speed = {"attn": "cudnn", "checkpointing": "full", "compiled": True}
    found = watch.planned(cfg, name, SimpleNamespace(type="cuda"), speed)
    H = 0 if name in ("kd", "dmd2v") else cfg.H
    same = dict(gpus=8, card_gb=80, H=H, N=cfg.N if H else 1, checkpointing="full", compiled=True)
    p = plan("1.3b", **{**cfg.planned(), **same})
    kinds = {"stage1": ["stage1"], "kd": []}.get(name, ["student", "critic"])
    assert found["seconds"] == p["seconds"][{"dmd2v": "stage2"}.get(name, name)]
    assert found.get("GB") == (max(p["peak"][kind] for kind in kinds) / GB if kinds else None)
