"""make publish: copy measured numbers and pictures from runs/ to results/, write the tables of the pages from them.

No number in these tables is typed by hand; tests/test_docs.py checks that they are the ones written here.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import tmd_minimal as tmd
from toys import (
    bench,
    claims_2d,
    claims_video,
    explore_plane,
    explore_video,
    pages,
    plane_pictures,
    verdicts,
    video_pictures,
)
from toys.video_teacher import RECIPES
from wan_scale.config import preset
from wan_scale.cost import benchmarks as wan_bench
from wan_scale.cost import plan as wan
from wan_scale.data import waiting
from wan_scale.rehearsal import report as rehearsal

RUNS, RESULTS = Path("runs"), Path("results")
PLANE = ("metrics.json", "samples.png", "inner_flow.png", "curves.png", "transition.gif", "explore.html")
VIDEO = ("metrics.json", "contact_sheet.png", "clips.gif", "quality_vs_nfe.png", "curves.png", "explore.html")
COPIES = {  # results: runs
    **{f"toy_2d/{name}": f"toy_2d/spirals/{name}" for name in PLANE},
    "toy_2d/checkerboard.png": "toy_2d/checkerboard/samples.png",
    **{f"toy_2d/{name}": f"toy_2d/claims/{name}" for name in ("claims.json", "claims.md", "quality_vs_nfe.png")},
    "toy_2d/bench.json": "toy_2d/bench.json",
    **{f"toy_video/{name}": f"toy_video/tiny/{name}" for name in VIDEO},
    **{f"toy_video/{name}": f"toy_video/claims-tiny/{name}" for name in ("claims.json", "claims.md")},
    "toy_video/claims_quality_vs_nfe.png": "toy_video/claims-tiny/quality_vs_nfe.png",
    "toy_video/why.png": "toy_video/claims-tiny/why.png",
    "toy_video/bench.json": "toy_video/bench.json",
    **{f"toy_video/{name}": f"toy_video/sweep-tiny/claims.{name.split('.')[1]}" for name in ("sweep.json", "sweep.md")},
    **{
        f"video_teacher/{teacher}/{name}": f"video_teacher/{teacher}/{name}"
        for teacher in RECIPES
        for name in ("teacher.safetensors", "teacher.json", "again.json")
    },
    "wan_shapes/scores.json": "wan-shapes/scores.json",
}

LISTS = {  # of jobs
    "toy_2d/claims": "toy_2d/claims",
    "toy_video/sweep": "toy_video/sweep-tiny",
    "toy_video/claims": "toy_video/claims-tiny",
}
PAGES = {"toy_2d/explore.html": explore_plane.TEMPLATE, "toy_video/explore.html": explore_video.TEMPLATE}
CLAIMS = {  # the paper's, in short; C5 and C9 to C12 as far as a rung has rows of them
    "C0": "transition matching beats flow matching at few steps (not TMD's own)",
    "C1": "TMD beats DMD2-v at like NFE, most at M = 1",
    "C1, equal M": "the same at equal M, where TMD takes more evaluations",
    "C1 parts": "the same, score by score, in long runs at M = 2 on ten other seeds",
    "C2": "quality rises with effective NFE; N and H are a fine dial",
    "C3": "rollout in stage 2 is crucial",
    "C4": "TM-MF beats TM as pretraining",
    "C5": "gated and concat fusion end level",
    "C6": "the inner target x_1 - x beats x",
    "C7": "dropping the recurrence at inference hurts",
    "C8": "the GAN helps, Conv3D heads most",
    "C9": "KD warm-up helps at M = 1, hurts at M = 2",
    "C10": "shifts of t_dmd and t_student help",
}


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def front() -> dict[str, str]:
    """Every table of README.md by the name of its marker, from results/ alone."""
    metrics = load("toy_2d/metrics.json")
    shown = ("data", "teacher_50", "teacher_2", "dmd2v", "tmd")  # toys/README.md has the other rows
    return {"metrics": plane_pictures.markdown({"models": {name: metrics["models"][name] for name in shown}})}


def rungs() -> dict[str, str]:
    """Every table of toys/README.md."""
    return {
        "metrics": plane_pictures.markdown(load("toy_2d/metrics.json")),
        "video": video_pictures.markdown(load("toy_video/metrics.json")),
        "overview": overview(),
    }


def overview() -> str:
    """What became of each claim of the paper on each rung: how many of its rows hold, by claims.json."""
    rows = {rung: load(f"{rung}/claims.json")["rows"] for rung in ("toy_2d", "toy_video")}
    equal = lambda row: row["claim"] == "C1" and "like NFE" not in row["setting"]
    part = lambda row: "C1, equal M" if equal(row) else row["claim"]

    def became(rung, claim):
        mine = [row for row in rows[rung] if part(row) == claim]
        verdicts, exact = (
            [row["verdict"] for row in mine],
            sum(row["setting"].startswith("exact oracle") for row in mine),
        )
        counts = {
            what: sum(v.startswith(what) for v in verdicts)
            for what in ("holds", "does not hold", "level", "inconclusive", "not run")
        }
        if waiting := sum(v.endswith("seeds") for v in verdicts):
            counts["being run"] = waiting
        return (
            ", ".join(f"{what} {n}" for what, n in counts.items() if n) or "-"
        ) + f" ({exact} of them by exact oracles)" * bool(exact)

    lines = ["| the paper's claim | points in the plane | moving shapes |", "|---|---|---|"]
    lines += [
        f"| {claim}: {text} | {became('toy_2d', claim)} | {became('toy_video', claim)} |"
        for claim, text in CLAIMS.items()
    ]
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """Every table of RESULTS.md."""
    costs = lambda rows: bench.markdown(rows) + "\n" + bench.rollout_cost(rows) + "\n"
    return {
        "claims": verdicts.judged(claims_2d.RUNG, load("toy_2d/claims.json")),
        "bench": costs(load("toy_2d/bench.json")),
        "video-claims": verdicts.judged(claims_video.rung("tiny"), load("toy_video/claims.json")),
        "video-students": "\n".join(claims_video.measured(load("toy_video/claims.json"))),
        "video-sweep": "\n".join(claims_video.measured(load("toy_video/sweep.json"))),
        "video-bench": costs(load("toy_video/bench.json")),
    }


def plans() -> dict[str, str]:
    """The tables of wan_scale/README.md: what presets take, by plan.py; students on moving shapes; waiting for data."""
    rows = [
        "| | GPUs | checkpointing | GB per GPU | fits | stage 1 | stage 2 (M = 2) | GPU-hours "
        "| 500k clips, GPU-hours | disk |",
        "|---" * 10 + "|",
    ]
    for name, gpus, size, lora in (
        ("1.3b", 1, 80, 0),
        ("1.3b", 8, 80, 0),
        ("14b", 1, 141, 64),
        ("14b", 8, 141, 0),
        ("14b", 64, 80, 0),
    ):
        p = wan.plan(name, **preset(name, gpus=gpus, card_gb=size, lora=lora).planned())
        peak, fits = max(p["peak"].values()) / wan.GB, "yes" if p["fits"] else "no"
        times = " | ".join(wan.duration(3600 * p["hours"][stage]) for stage in ("stage1", "stage2"))
        costs = f"{sum(p['hours'].values()) * gpus:,.0f} | {p['clip hours']:,.0f} | {p['clip bytes'] / wan.GB:,.0f} GB"
        what = f"{name}, LoRA" if lora else name
        rows.append(
            f"| {what} | {gpus} of {size} GB | {p['checkpointing']} | {peak:.0f} | {fits} | {times} | {costs} |"
        )
    shapes = json.loads((RESULTS / "wan_shapes/scores.json").read_text(encoding="utf-8"))["models"]
    keys = ("total", "quality", "semantic", "motion", "diversity")
    judged = [f"| model | effective NFE | {' | '.join(keys)} |", "|---" * (len(keys) + 2) + "|"]
    for name, m in shapes.items():
        judged.append(
            f"| {name} | {m['effective_nfe']:g} | {m['total']:.3f} ± {m['error']:.3f} | "
            + " | ".join(f"{m[k]:.3f}" for k in keys[1:])
            + " |"
        )
    waits = waiting.table([load(f"wan_waiting/{size}.json") for size in ("full", "tiny")])
    return {"plan": "\n".join(rows) + "\n", "shapes": "\n".join(judged) + "\n", "waiting": waits}


REHEARSED = """# Counted and measured

Written by `make publish`.

## Counted without a GPU

`make rehearse` runs one update of each phase at full size, with the code that trains, on PyTorch's
fake tensors. They have shapes, types and devices but no memory. Every allocation and every product of
matrices is counted, on the first of the GPUs. The plan beside is of the same settings. A GB is 2^30
bytes. The counts are in [`results/wan_rehearsal/`](../results/wan_rehearsal), each with its command.

"""
SAMPLED = """
It also samples one clip with the pipeline that `export` writes, from a prompt of 512 tokens to
pixels. The student is in bf16, keeps the prompt's keys and values, and runs M transitions of N steps.
Text encoder, student and VAE (float32) lie on one GPU. Activations are all that is there beside
weights when a part has its peak. Together it is all weights and the largest activations. Tiles are
those of `vae.enable_tiling()`, which `sample` does not call.

"""


def benchmarks() -> str:
    """wan_scale/BENCHMARKS.md from the JSON files of `run.py rehearse` and `run.py bench`."""
    read = lambda folder: [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    counted = sorted(read(RESULTS / "wan_rehearsal"), key=lambda record: (record["size"] == "14b", record["gpus"]))
    there = any("sampling" in record for record in counted)
    sampled = SAMPLED + rehearsal.sampling_markdown(counted) if there else ""
    return (
        f"{REHEARSED}{rehearsal.markdown(counted)}{sampled}\n{rehearsal.NOT_COVERED}\n\n## Measured on GPUs\n\n"
        f"From [`bench_results/`](bench_results).\n\n{wan_bench.markdown(read(wan_bench.RESULTS))}"
    )


def weights() -> None:
    """results/toy_video/weights.pt: EMAs of `make video`'s students in half precision, for tiny_video.published()."""
    folder = RUNS / "toy_video/tiny/checkpoints"
    names = {"stage1": "tmd.stage1", "tmd": "tmd.stage2", "dmd2v": "dmd2v.stage2"}
    if all((folder / f"{file}.pt").exists() for file in names.values()):
        average = lambda file: {
            key: value.half() for key, value in tmd.safe_load(folder / f"{file}.pt")["parts"]["ema"].items()
        }
        tmd.atomic_save({name: average(file) for name, file in names.items()}, RESULTS / "toy_video/weights.pt")


def poorer(run: Path, result: Path) -> bool:
    """Whether `run` is of claims that lack a row which was published: it was made from a part of the jobs."""
    new, old = run.parent / "claims.json", result.parent / "claims.json"
    measured = lambda file: {
        (r["claim"], r["setting"])
        for r in json.loads(file.read_text(encoding="utf-8"))["rows"]
        if r["verdict"] != "not run" and not r["verdict"].endswith("seeds")
    }
    return run.parent.name.startswith("claims") and old.exists() and new.exists() and not measured(new) >= measured(old)


def reproduced(folder: Path) -> bool:
    """Whether a folder's teacher is the published one, trained again by the same recipe (video_teacher --compare)."""
    file = folder / "again.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return bool(found) and found["same recipe"] and found["agree"]


def fill(text: str, found: dict[str, str]) -> str:
    """Replace what stands between <!-- NAME --> and <!-- /NAME --> by the table of that name."""
    for name, table in found.items():
        text, n = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=table: m[1] + t + m[2], text, flags=re.S
        )
        if n != 1:
            raise ValueError(
                f"the page has {n} places for the table {name!r}; it needs one <!-- {name} --> ... <!-- /{name} -->."
            )
    return text


def collect() -> None:
    """Copy what was run from runs/ to results/."""
    for result, run in COPIES.items():
        run, result = RUNS / run, RESULTS / result
        if not run.exists():  # what was not run again stays as it was published
            continue
        if run.name.startswith("teacher.") and reproduced(run.parent):
            continue  # students start from the published one
        if poorer(run, result):
            print(
                f"{result} is kept: {run} lacks rows that were measured; "
                "run the jobs that are missing (--claims) and publish again."
            )
            continue
        result.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run, result)
    for result, run in LISTS.items():  # every finished job, so that another machine can go on from them
        files = "jobs/*.json", "*/teacher.json", "pilot.json", "claims.config.json"
        for file in (f for pattern in files for f in (RUNS / run).glob(pattern)):
            kept = RESULTS / result / file.relative_to(RUNS / run)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, kept)
    for run in RUNS.glob("wan-rehearsal/*.json"):
        (RESULTS / "wan_rehearsal").mkdir(exist_ok=True)
        shutil.copy(run, RESULTS / "wan_rehearsal")


def main() -> None:
    collect()
    weights()
    for page, template in PAGES.items():  # of today's style and script, also where nothing was run again
        pages.write(RESULTS / page, template, *pages.read(RESULTS / page))
    texts = {"README.md": front, "toys/README.md": rungs, "RESULTS.md": tables, "wan_scale/README.md": plans}
    for page, found in texts.items():
        Path(page).write_text(fill(Path(page).read_text(encoding="utf-8"), found()), encoding="utf-8")
    Path("wan_scale/BENCHMARKS.md").write_text(benchmarks(), encoding="utf-8")


if __name__ == "__main__":
    main()
