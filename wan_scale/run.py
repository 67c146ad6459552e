"""Distil Wan2.1 with TMD: from weights and a prompt file to a one- or two-step student, its videos and a score sheet.

    python wan_scale/run.py --preset tiny                        # the whole ladder on a laptop, nothing to download
    python wan_scale/run.py plan --preset 1.3b --gpus 8          # does it fit, how long does it take
    torchrun --nproc-per-node 8 wan_scale/run.py --preset 1.3b --model Wan2.1-T2V-1.3B-Diffusers --from wan-clips

Without a subcommand it runs data, stage1, stage2, sample and eval, and skips what is finished. After a stop the same
command goes on from the last checkpoint.

    plan      parameters, memory, seconds, disk: before anything starts
    data      clips to train on: published latents (--from FOLDER), the teacher's own samples, or --videos
    stage1    TM-MF pretraining of backbone and flow head
    stage2    DMD2-v with the head rolled out
    kd        the baseline's KD warm-up on teacher pairs (M = 1)
    dmd2v     the baseline: DMD2-v with the whole network as the student
    sample    prompts to mp4 (--student tmd, dmd2v or teacher; --M and --N may differ from training)
    export    the student as a folder for TMDWanPipeline.from_pretrained
    eval      score sheet of what was sampled; with --vbench-results VBench's three numbers beside the paper's
    bench     seconds and memory of every step on this GPU at full size, with random weights: nothing to download
    smoke     every step once, few updates of everything, at full size with random weights: nothing to download
    rehearse  an update of each phase and a sample at full size, without a GPU: bytes and FLOPs counted beside plan's
    teacher   flow matching of MODEL's transformer on the shards, for folders made by hand

    compare   A B, two folders of samples: pages for a blind preference study; --tally ANSWERS...: its win rates
    report    report.html of the runs in FOLDER or OUT: curves, previews, plan and actual, alarms
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from dataclasses import asdict, replace
from pathlib import Path

if __name__ == "__main__":
    if sys.getfilesystemencoding().lower() != "utf-8":  # a locale such as C: prompts are file names, in any language
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository: this runs as a script from anywhere

from settings import command as run_command
from settings import parser
from wan_scale.config import PRESETS, Wan, preset
from wan_scale.pages.command import PAGES, pages

COMMANDS = ("plan", "data", "stage1", "stage2", "kd", "dmd2v", "sample", "export", "eval", "bench", "smoke", "rehearse",
            "teacher")  # fmt: skip
NEEDS = """Nothing was started: this reproduction needs three things that are not here.

  weights   a Wan2.1-T2V folder in the Hugging Face layout (tens of GB with its text encoder), given with --model
  clips     published ones, given with --from FOLDER (wan_scale/README.md says which), or prompts, one a line, given
            with --prompts, of which the teacher makes clips: many times the cost of training
            (the paper: 500k VidProM prompts, extended by Qwen2.5-7B)
  GPUs      see `python wan_scale/run.py plan --preset 1.3b --gpus 8`

To see every step run now on this machine, with a tiny random Wan and nothing to download (about a minute):

  python wan_scale/run.py --preset tiny

It makes the folder, 16 teacher clips, trains stage 1 and stage 2, writes mp4s of student and teacher and a score sheet.
The weights are random, so the videos are noise: it shows that everything works, not how well.
"""


def parse(argv=None):
    """(command or None, settings, the names given on the command line, dry run?, what compare and report take)."""
    p = parser(Wan, __doc__, tally="compare: join the raters' files that are given, for the study in OUT")
    p.usage = "run.py [COMMAND] [PATH ...] [--preset tiny|1.3b|14b] [options]"
    one_of = f"one of {', '.join((*COMMANDS, *PAGES))}; none: the ladder"
    p.add_argument("command", nargs="?", choices=(*COMMANDS, *PAGES), metavar="COMMAND", help=one_of)
    p.add_argument("paths", nargs="*", metavar="PATH", help="of compare and report alone: folders, or raters' files")
    p.add_argument("--preset", choices=tuple(PRESETS), help="tiny, 1.3b or 14b: Table 7's settings (default: 1.3b)")
    p.add_argument("--dry-run", action="store_true", help="print the resolved settings as JSON and stop")
    args = vars(p.parse_intermixed_args(argv))  # paths may stand before and after options
    command, name, dry = args.pop("command"), args.pop("preset"), args.pop("dry_run")
    own = {"paths": args.pop("paths"), "tally": args.pop("tally")}
    if any(own.values()) and command not in PAGES:
        p.error(f"{command or 'the ladder'} takes no {'--tally' if own['tally'] else own['paths'][0]}; see --help.")
    return command, name, args, dry, own


def make_data(cfg: Wan, kd: bool = False) -> None:
    """Clips, once: their own manifest says whether they are these."""
    from wan_scale.data import shards
    from wan_scale.data.lock import only_one
    from wan_scale.training import dist

    dist.start(cfg.device)
    out = cfg.folder("kd-pairs") if kd else cfg.shards
    if not kd and of_others(cfg, out):
        if not shards.complete(out):
            raise RuntimeError(f"{out} is unfinished; give the `data` command that began it once more.")
        dist.say(f"{out} was made by another command; its clips are taken as they are.")
    else:
        with only_one(out, dist.rank()):
            for left in out.glob("*.tmp") if dist.rank() == 0 else ():
                left.unlink()  # of a kill
            dist.barrier()  # no rank writes before this
            make_clips(cfg, out, kd)
            dist.barrier()
    if dist.rank() == 0:
        print(shards.summary(out), flush=True)


def midway(cfg: Wan) -> str:
    """The phase of OUT that was stopped midway, or "": it goes on with the very clips that it began with."""
    from wan_scale.training import checkpoints

    begun = (p for p in ("stage1", "stage2", "dmd2v") if not cfg.folder(p, "student.json").exists())
    return next((p for p in begun if checkpoints.complete(cfg.folder(p, "checkpoints"))), "")


def of_others(cfg: Wan, out: Path) -> bool:
    """Whether a data folder was made by a command that this one does not repeat.

    It holds published clips or videos, and none are given now; or, named by --data, samples of another transformer.
    """
    from wan_scale.data.files import read_json
    from wan_scale.data.folders import fingerprint

    if cfg.from_ or cfg.videos or not (out / "manifest.json").exists():
        return False
    manifest = read_json(out / "manifest.json")
    if manifest.get("kind") != "teacher":
        return True
    return bool(cfg.data) and manifest.get("transformer") != fingerprint(Path(cfg.model), "transformer")


def with_prompts(cfg: Wan, n: int, name: str = "captions.jsonl") -> Wan:
    """The settings with prompts where none were given: the first n captions of the data, in OUT/NAME.

    An edited file stays; one of fewer prompts gets the others.
    """
    from wan_scale.data import shards
    from wan_scale.data.files import atomic
    from wan_scale.training import dist

    path = cfg.folder(name)
    if dist.rank() == 0 and (cfg.shards / "manifest.json").exists():
        prompts = shards.captions(cfg.shards, n)
        if not prompts and not path.exists():
            raise RuntimeError(f"the clips of {cfg.shards} have no prompts; give some to sample with --prompts.")
        lines = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts).encode()
        if not path.exists() or lines.startswith(path.read_bytes()):
            cfg.folder().mkdir(parents=True, exist_ok=True)
            with atomic(path) as file:
                file.write(lines)
    dist.barrier()
    return replace(cfg, prompts=str(path))


def make_clips(cfg: Wan, out: Path, kd: bool) -> None:
    """This rank's part of a data folder."""
    from wan_scale import speed
    from wan_scale.data import published, teacher, videos
    from wan_scale.training import dist

    device = dist.start(cfg.device)
    where = {"rank": dist.rank(), "world": dist.world(), "device": device}
    if not kd and (phase := midway(cfg)):
        dist.say(f"{phase} was stopped midway: {out} takes no new clips before it has ended.")
        where["grow"] = False
    clip = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width, "shard_size": cfg.shard_size}
    if cfg.from_ and not kd:
        how = {"kind": cfg.from_kind, "convert": cfg.convert, "check": cfg.from_check, "limit": cfg.clips or None}
        published.take(cfg.model, cfg.from_, out, **how, **clip, **where)
    elif cfg.videos and not kd:
        videos.encode_videos(cfg.model, cfg.videos, out, limit=cfg.clips or None, **clip, **where)
    else:

        def fast(transformer):
            how = speed.chosen(cfg, dict(transformer.config), device, transformer.dtype, backward=False)
            speed.stock(transformer, **how)

        how = dict(fast=fast, steps=cfg.data_steps, guidance=cfg.data_guidance, flow_shift=cfg.flow_shift,
                   sampler=cfg.sampler, limit=(cfg.kd_clips if kd else cfg.clips) or None)  # fmt: skip
        # choice: KD pairs from noise that the training data have not seen
        own = {"kd": True, "seed_offset": 1_000_000, "skip_layer": None if cfg.skip_layer < 0 else cfg.skip_layer}
        teacher.generate(cfg.model, cfg.prompts, out, **how, **(own if kd else {}), **clip, **where)


def evaluate(cfg: Wan, folders=None) -> None:
    from wan_scale.sampling import evaluate, sample
    from wan_scale.training import dist

    sampled = [f for f in sorted(cfg.folder("samples").glob("*")) if f.is_dir() and any(f.glob("*.mp4"))]
    folders = folders or {f.name: f for f in sampled}
    if not folders:
        raise RuntimeError(f"{cfg.folder('samples')} holds no videos; run `sample` first.")
    if dist.rank() == 0:
        print(evaluate.sheet(cfg, folders))
        print(f"{sample.grid(cfg, folders)}\n{cfg.folder('scores.md')}", flush=True)
        if Path(cfg.model).resolve().name == "tiny-wan":
            print("The weights are random: this shows that every step works, not how well.")


def size_of(name: str) -> dict:
    """The transformer's config of a preset."""
    from wan_scale.cost.sizes import WAN
    from wan_scale.tiny import TRANSFORMER

    return WAN[name] if name in WAN else {**WAN["1.3b"], **TRANSFORMER}


def bench(cfg: Wan, name: str) -> None:
    from wan_scale import bench
    from wan_scale.cost import benchmarks

    out = None if name != "tiny" else cfg.folder("bench")  # a laptop's numbers are nobody's benchmark
    print(benchmarks.markdown([bench.run(cfg, size_of(name), name, out)]))


def smoke(cfg: Wan, name: str, given: dict) -> None:
    from wan_scale import smoke
    from wan_scale.training import dist

    dist.start(cfg.device)
    smoke.run(smoke.settings(cfg, name, given), size_of(name))
    dist.stop()


def rehearse(cfg: Wan, name: str) -> None:
    from wan_scale.data.files import write_json
    from wan_scale.rehearsal import report

    command = " ".join(["python wan_scale/run.py", *sys.argv[1:]])
    record = report.run(cfg, size_of(name), name, command, [cfg.phase] if cfg.phase else list(report.PHASES))
    print(report.text(record))
    path = Path("runs/wan-rehearsal", f"{report.label(record)}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    print(path)


def plan(cfg: Wan, name: str) -> None:
    from wan_scale.cost.report import report
    from wan_scale.cost.work import measured_rates
    from wan_scale.data.files import read_json

    given = Path(cfg.model) / "transformer" / "config.json" if cfg.model else None
    if given and not given.exists():
        raise RuntimeError(
            f"{given} is missing; give a Wan2.1 folder in the Hugging Face layout, or leave --model away."
        )
    model = read_json(given) if given else size_of(name)
    if cfg.rates and not Path(cfg.rates).is_file():
        raise RuntimeError(f"{cfg.rates} is missing; give a JSON of bench_results/ with --rates, or leave it away.")
    rates = measured_rates(read_json(Path(cfg.rates)), cfg.tf32) if cfg.rates else None
    print(report(model, rates=rates, **cfg.planned()))


def lacks_prompts(cfg: Wan, command: str | None) -> bool:
    """Whether a command has nothing to make clips of, or nothing to sample."""
    there = (cfg.shards / "manifest.json").exists()
    if command in ("sample", "kd"):
        return not (cfg.prompts or there or (cfg.vbench_info and command == "sample"))
    return command in (None, "data") and not (cfg.prompts or cfg.videos or cfg.from_ or there)


def work(command: str | None, name: str | None, given: dict, dry: bool, own: dict) -> None:
    cfg = preset(name or "1.3b", **given)
    if dry:
        resolved = {"command": command or "data, stage1, stage2, sample, eval", "preset": name or "1.3b", **asdict(cfg)}
        print(json.dumps(resolved, indent=1))
        return
    if command in PAGES:
        return print(pages(cfg, command, "out" in given, **own))
    if command == "plan":
        return plan(cfg, name or "1.3b")
    if command == "smoke":
        return smoke(cfg, name or "1.3b", given)
    if command in ("bench", "rehearse"):
        return {"bench": bench, "rehearse": rehearse}[command](cfg, name or "1.3b")
    if name == "tiny":
        from wan_scale.tiny import tiny_world

        cfg = tiny_world(cfg)
    elif not cfg.model or lacks_prompts(cfg, command):
        print(NEEDS)
        raise RuntimeError("give --model and --prompts (or --from FOLDER), or --preset tiny.")
    from wan_scale import preflight
    from wan_scale.data.folders import check_folder, free_memory
    from wan_scale.sampling import sample
    from wan_scale.training import dist, train

    check_folder(cfg.model)
    preflight.check(cfg, command)
    dist.start(cfg.device)
    if command in (None, "data", "stage1", "stage2", "kd", "dmd2v", "teacher"):
        train.accumulation(cfg)  # before hours of data
    if command == "sample" and not (cfg.prompts or cfg.vbench_info):
        cfg = with_prompts(cfg, cfg.sample_prompts or 64)
    if command == "kd" and not cfg.prompts:
        cfg = with_prompts(cfg, cfg.kd_clips or sys.maxsize, "kd-captions.jsonl")
    if not command and (cfg.prompts or cfg.vbench_info):
        sample.planned(cfg)
    m, n = given.get("M"), given.get("N")  # sampling may differ from training only where the command line says so
    steps = {
        "data": lambda: make_data(cfg),
        "stage1": lambda: train.stage1(cfg),
        "stage2": lambda: train.stage2(cfg),
        "kd": lambda: (make_data(cfg, kd=True), train.kd(cfg)),
        "dmd2v": lambda: train.stage2(cfg, plain=True),
        "sample": lambda: sample.sample(cfg, m, n),
        "export": lambda: print(sample.export(cfg)) if dist.rank() == 0 else None,
        "eval": lambda: evaluate(cfg),
        "teacher": lambda: train.teacher(cfg),
    }
    for step in (command,) if command else ("data", "stage1", "stage2"):
        steps[step]()
        free_memory()  # or the next phase would find the last one's nets on the GPU
        if step == "data" and not command and not (cfg.prompts or cfg.vbench_info):
            cfg = with_prompts(cfg, cfg.sample_prompts or 64)
            sample.planned(cfg)
    if not command:
        evaluate(cfg, {who: sample.sample(replace(cfg, student=who)) for who in ("tmd", "teacher")})
    dist.stop()  # not after an error: torchrun ends the other ranks, which may wait in a collective


def main(argv=None) -> int:
    command, name, given, dry, own = parse(argv)
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # everything is read from the folder given
    quiet |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    # one process saves alone, as it should; and nothing writes in place into what a sharded net returns
    for words in ("torch.distributed is disabled", "FSDP2-wrapped module .* returned a view"):
        warnings.filterwarnings("ignore", words)
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    status = run_command("wan_scale", lambda: explain(lambda: work(command, name, given, dry, own)))
    if status and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        os._exit(status)  # at once: taking the group down could wait for ranks that wait for this one
    return status


def explain(work) -> None:
    """Run `work`; an error that is not one of this repository's own sentences shows where it came from."""
    try:
        work()
    except (RuntimeError, ValueError, OSError) as e:
        *_, last = traceback.extract_tb(e.__traceback__)
        if not Path(last.filename).is_relative_to(Path(__file__).resolve().parents[1]) or ".venv" in last.filename:
            traceback.print_exc()
        raise


if __name__ == "__main__":
    sys.exit(main())
