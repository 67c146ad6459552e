"""`sample`: prompts to mp4, and a grid beside the teacher. `export`: the student as a folder for from_pretrained."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import tmd_minimal as tmd
from wan_scale import speed
from wan_scale.config import Wan
from wan_scale.data.files import file_sha256, read_json, write_json, writing
from wan_scale.data.folders import check_folder, check_words, checksums, loading
from wan_scale.data.prompts import NEGATIVE, read_prompts
from wan_scale.pictures import contact_sheet, needs_ffmpeg, read_video, write_video
from wan_scale.pipeline import HOW, TMDWanModel, TMDWanPipeline
from wan_scale.sampling import vbench
from wan_scale.seeds import mixed
from wan_scale.training import dist, kept, lora, students, weights
from wan_scale.training.train import compute_dtype

WRITTEN = "export.json"  # in an exported folder: the files that export put there
PROMPTS = "prompts.json"  # in a folder of samples: {file name: whole prompt}, for a long one is cut in the name
PHASES = {"tmd": ("stage2", "stage1"), "dmd2v": ("dmd2v", "kd")}  # the last finished phase counts


def finished_student(cfg: Wan) -> tuple[Path, dict]:
    """Folder and description of the newest finished student of cfg's kind."""
    if cfg.student not in PHASES:
        raise ValueError(f"the {cfg.student} is the folder {cfg.model}; choose a student (--student tmd or dmd2v).")
    for phase in PHASES[cfg.student]:
        if (cfg.folder(phase) / "student.json").exists():
            return cfg.folder(phase), students.described(cfg.folder(phase))
    raise RuntimeError(f"{cfg.out} holds no finished {cfg.student} student; run `{PHASES[cfg.student][0]}` first.")


def make_model(cfg: Wan, dtype: torch.dtype = torch.float32, device="cpu") -> TMDWanModel:
    """The finished student as it is exported; every weight must fit. In bf16, diffusers' float32 weights stay so.

    It begins without memory and each weight is read to the device in its dtype: never more than it is.
    """
    from accelerate import init_empty_weights

    folder, facts = finished_student(cfg)
    students.check_weights(folder)
    check_folder(cfg.model)
    made, alpha = facts.get("transformer"), facts["recipe"].get("--lora") and facts["recipe"]["--lora-scale"]
    if alpha and made and (made != students.transformer_of(cfg) or students.other_bytes(facts, cfg)):
        other = f"{folder} holds adapters of another transformer than {cfg.model}'s, or that one is damaged"
        raise RuntimeError(f"{other}; give the --model that they were trained on, or copy it again.")
    config = read_json(Path(cfg.model) / "transformer" / "config.json")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    with init_empty_weights():
        model = TMDWanModel(config, {key: facts[key] for key in HOW}, facts["recipe"] | {"phase": facts["phase"]})
    weights.cast(model, dtype)
    own = weights.files(folder / "student.safetensors", "student.")
    if alpha:
        base = weights.files(Path(cfg.model) / "transformer", "student.net.transformer.")
        lora.merge(model, device, base, own, alpha)
    else:
        weights.check(model, own)
        weights.fill(model, device, own)
    weights.check_finite(model, folder)
    return model.eval()


def make_pipeline(cfg: Wan, device, teacher: bool = False, dtype: torch.dtype | None = None):
    """The student's pipeline, or the teacher's stock one, with the folder's text encoder and VAE (always float32)."""
    from diffusers import AutoencoderKLWan, WanPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()  # of loading parts
    check_folder(cfg.model)
    dtype = dtype or compute_dtype(cfg, device)
    student = None if teacher else make_model(cfg, dtype, device)
    with loading(cfg.model):
        # float32, as Wan's authors decode
        vae = AutoencoderKLWan.from_pretrained(cfg.model, subfolder="vae", dtype=torch.float32)
        own = {} if teacher else {"transformer": None}
        pipe = WanPipeline.from_pretrained(cfg.model, vae=vae, dtype=dtype, **own)
    check_words(cfg.model, pipe.tokenizer, pipe.text_encoder)
    if teacher:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=cfg.flow_shift)
    else:
        keep = {key: pipe.components[key] for key in ("tokenizer", "text_encoder", "vae", "scheduler")}
        pipe = TMDWanPipeline(**keep, transformer=student)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def folder_of(cfg: Wan, M: int | None = None, N: int | None = None) -> Path:
    """OUT/samples/<who>, with the grid in its name where it is not the one that was trained."""
    name = cfg.student
    if name != "teacher":
        facts = finished_student(cfg)[1]
        grid = grid_of(facts, M, N)
        name += "" if all(grid[key] == facts[key] for key in grid) else f"-M{grid['M']}N{grid['N']}"
    return cfg.folder("samples", name)


def grid_of(facts: dict, M: int | None, N: int | None) -> dict:
    """{"M", "N"} that are sampled: those given, else those of the training; without a flow head N is 1."""
    return {"M": facts["M"] if M is None else M, "N": (facts["N"] if N is None else N) if facts["H"] else 1}


def planned(cfg: Wan) -> list[vbench.Video]:
    """What to sample: VBench's own list, or every prompt of the file, `samples_per_prompt` each.

    A video's name and seed depend on its prompt, its number and --seed alone; a seed in the file stands as it is.
    RuntimeError where no video could be written.
    """
    needs_ffmpeg()
    if cfg.vbench_info:
        found = vbench.plan_videos(vbench.read_prompts(cfg.vbench_info), samples=cfg.samples_per_prompt)
        return [video._replace(seed=mixed(cfg.seed, video.name)) for video in found]
    records = read_prompts(cfg.prompts, numbered=False)[: cfg.sample_prompts or None]
    found, number = [], Counter()  # a prompt may come again with another seed
    for record in records:
        prompt, given = record["prompt"], record["seed"]
        for i in range(cfg.samples_per_prompt):
            k = number[prompt]
            number[prompt] += 1
            own = mixed(cfg.seed, f"{prompt}/{k}") if given is None else given if i == 0 else mixed(given, i)
            # torch's CPU generator would look at the low 32 bits of a large one alone
            seed = own if given is None or own < 2**32 else mixed(own, 0)
            found.append(vbench.Video(prompt, k, f"{file_name(prompt)}-{k}.mp4", seed))
    return found


def file_name(prompt: str) -> str:
    """The prompt where it can be a file's name; else what is left of it, and a digest, so that no two are alike."""
    name = "".join(ch if ch.isalnum() or ch in " ,.-_'" else "_" for ch in prompt)
    name = name.encode()[:180].decode(errors="ignore")  # file systems count bytes
    if name == prompt and not name.startswith("."):
        return name
    return f"{name.lstrip('.')}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def check_parts(cfg: Wan, facts: dict) -> dict[str, str]:
    """Checksums of the folder's text encoder and VAE; RuntimeError if they are none of those at the student's training.

    A student trained by an older version does not know them.
    """
    found = checksums(cfg.model)
    if other := [part for part, sha256 in (facts.get("parts") or found).items() if found.get(part) != sha256]:
        apart = f"{cfg.model} has another {' and '.join(other)} than when the student was trained, or a damaged one"
        raise RuntimeError(f"{apart}; copy it again, or give the --model of the training.")
    return found


def stamp(folder: Path, cfg: Wan, teacher: bool, grid: dict) -> dict:
    """made.json says what made a folder's videos; RuntimeError if another did: they would be scored as these."""
    made = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width}
    if teacher:
        made |= {"steps": cfg.data_steps, "guidance": cfg.data_guidance, "flow_shift": cfg.flow_shift}
        made |= {"transformer": students.transformer_of(cfg), "parts": checksums(cfg.model)}
    else:
        facts = students.check_weights(finished_student(cfg)[0])
        made |= {"phase": facts["phase"], "student": facts["sha256"], **grid, "parts": check_parts(cfg, facts)}
    path = folder / "made.json"
    old = read_json(path) if path.exists() else made
    if older := [key for key in made if key not in old]:
        untold = f"{folder} holds videos that an older version made, which did not note their {', '.join(older)}"
        raise RuntimeError(f"{untold}; move it away to sample anew.")
    if other := ", ".join(key for key in made if old[key] != made[key]):
        raise RuntimeError(f"{folder} holds videos made with another {other}; move it away to sample anew.")
    for left in folder.glob(".*.tmp.mp4") if dist.rank() == 0 else ():
        left.unlink()  # of a kill
    dist.barrier()  # all have looked before one writes
    if dist.rank() == 0:
        write_json(path, made)
    return made


def sample(cfg: Wan, M: int | None = None, N: int | None = None) -> Path:
    """Every planned video that is not there yet, to OUT/samples/<student>/; timing.json has the seconds of each part.

    A video of another seed, or one that is not whole, is made anew. M, N: other than the student was trained with.
    RuntimeError where frames are not finite or the disk does not take a video.
    """
    device, teacher = dist.start(cfg.device), cfg.student == "teacher"
    folder = folder_of(cfg, M, N)
    folder.mkdir(parents=True, exist_ok=True)
    made = stamp(folder, cfg, teacher, {} if teacher else grid_of(finished_student(cfg)[1], M, N))
    todo = vbench.missing(folder, planned(cfg)[dist.rank() :: dist.world()], made)
    dist.say(f"sample: {len(todo)} videos to make on this rank, in {folder}")
    if dist.rank() == 0:
        old = read_json(folder / PROMPTS) if (folder / PROMPTS).exists() else {}
        write_json(folder / PROMPTS, {**old, **{video.name: video.prompt for video in planned(cfg)}})
    if not todo:
        dist.barrier()
        return folder
    pipe, times = make_pipeline(cfg, device, teacher), []
    config = read_json(Path(cfg.model) / "transformer" / "config.json")
    fast = speed.chosen(cfg, config, device, compute_dtype(cfg, device), backward=False)
    speed.stock(pipe.transformer, **fast) if teacher else pipe.fast(**fast, graphed=cfg.graph != "off")
    size = {"height": cfg.height, "width": cfg.width, "num_frames": cfg.frames}
    guided = {"num_inference_steps": cfg.data_steps, "guidance_scale": cfg.data_guidance, "negative_prompt": NEGATIVE}
    more = guided if teacher else {"M": M, "N": N if pipe.transformer.how.H else None}
    for video in tqdm(todo, desc=f"sample {cfg.student}", disable=None if dist.rank() == 0 else True):
        g = torch.Generator().manual_seed(video.seed)
        frames = pipe(video.prompt, generator=g, **size, **more).frames[0]
        if not np.isfinite(frames).all():
            for part in ("text_encoder", "transformer", "vae"):
                weights.check_finite(getattr(pipe, part), f"the {cfg.student}'s {part}")
            nothing = f"the {cfg.student}'s frames for {video.prompt[:60]!r} are not finite"
            raise RuntimeError(f"{nothing}; try --precision fp32, or train that phase again.")
        write_video(frames, folder / video.name, comment=vbench.label(video, made))
        times.append(getattr(pipe, "seconds", {}))
    if dist.rank() == 0 and not teacher:
        how, layers = pipe.transformer.how, pipe.transformer.layers
        m, n = how.M if M is None else M, how.N if N is None or not how.H else N
        facts = {"M": m, "N": n, "effective_nfe": tmd.effective_nfe(m, n, how.H, layers), "videos": len(times)}
        facts |= {**size, "device": str(device)}
        median = {part: float(np.median([t[part] for t in times])) for part in times[0]}
        kept.write(folder / "timing.json", {**facts, "median_seconds": median})
    dist.barrier()
    return folder


def grid(cfg: Wan, folders: dict[str, Path], prompts: int = 4) -> str:
    """samples/grid.png and grid.mp4: every model's video of the first prompts, side by side; returns where, or why not.

    folders: {name: folder of mp4s}.
    """
    shared = set.intersection(*({file.name for file in folder.glob("*-0.mp4")} for folder in folders.values()))
    names = {name: name.removesuffix("-0.mp4") for name in sorted(shared)[:prompts]}
    if cfg.prompts or cfg.vbench_info:  # in their order and words, where the file is at hand
        told = {v.name: v.prompt for v in planned(cfg) if v.index == 0 and v.name in shared}
        names = dict(list(told.items())[:prompts]) or names
    if not names:
        return "no picture: there is no prompt of which every model has a video."
    clips = {(name, who): read_video(folder / name).numpy() for name in names for who, folder in folders.items()}
    if len(sizes := {clip.shape[:3] for clip in clips.values()}) > 1:
        return f"no picture: the videos are of {len(sizes)} sizes, so they do not stand side by side."
    first = next(iter(folders))
    path = cfg.folder("samples", "grid.png")
    rows = [(names[name] if who == first else "", who, clips[name, who]) for name in names for who in folders]
    contact_sheet(rows, path)
    # prompts across, models down
    moving = np.concatenate([np.concatenate([clips[name, who] for name in names], 2) for who in folders], 1)
    for left in path.parent.glob(".*.tmp.mp4"):
        left.unlink()  # of a kill
    write_video(moving, path.with_suffix(".mp4"))
    return str(path)


CARD = """---
license: other
library_name: wan_scale
pipeline_tag: text-to-video
---
# {title}

A Wan2.1 student of Transition Matching Distillation (arXiv:2601.09881): {M} outer transition(s) of {N} inner step(s),
flow head of {H} blocks, effective NFE {nfe:.2f}, no guidance. Made from `{teacher}`, phase `{phase}`.

Wan2.1's weights are under Apache-2.0. The licence of the clips that it was trained on counts as well.

With the code it was made with on the Python path (the folder that holds `wan_scale/`):

```python
import torch
from wan_scale.pipeline import TMDWanPipeline
pipe = TMDWanPipeline.from_pretrained("PATH", dtype={{"vae": torch.float32, "default": torch.bfloat16}}).to("cuda")
g = torch.Generator().manual_seed(0)
video = pipe("a prompt", num_frames={frames}, height={height}, width={width}, generator=g).frames[0]
```

| setting | value |
|---|---|
{recipe}
"""


def export(cfg: Wan) -> Path:
    """OUT/export: the student, text encoder, tokenizer, VAE and a model card, for TMDWanPipeline.from_pretrained.

    Files that `export` did not write stay, and so does a card that was edited. RuntimeError where the disk is full.
    """
    _, facts = finished_student(cfg)
    check_parts(cfg, facts)
    final = cfg.folder("export" if cfg.student == "tmd" else f"export-{cfg.student}")
    temporary = final.with_name(final.name + ".tmp")
    pipe = make_pipeline(cfg, torch.device("cpu"), dtype=torch.float32)
    shutil.rmtree(temporary, ignore_errors=True)
    name = f"TMD M{facts['M']} N{facts['N']} H{facts['H']}" if facts["H"] else "DMD2-v"
    teacher = Path(cfg.model).resolve().name
    recipe = "\n".join(f"| {key} | {value} |" for key, value in facts["recipe"].items())
    plain = {key: facts[key] for key in ("M", "N", "H", "phase", "frames", "height", "width")}
    title, nfe = f"{teacher}, {name}", facts["effective_nfe"]
    try:
        with writing(final):
            pipe.save_pretrained(temporary, safe_serialization=True)
            card = CARD.format(title=title, nfe=nfe, teacher=teacher, recipe=recipe, **plain)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            replace_files(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def replace_files(new: Path, final: Path) -> None:
    """Move the files of `new` over those of `final` that an earlier call put there; the user's own stay.

    The index goes first and comes last, so that a kill leaves no folder that loads as half of each.
    """
    listed, index, card = final / WRITTEN, "model_index.json", "README.md"
    old = read_json(listed) if listed.exists() else {}
    files = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
    written = {name: file_sha256(new / name) if name == card else "" for name in files}
    if (final / card).exists() and old.get(card, "") != file_sha256(final / card):
        print(f"{final / card} was edited and stays as it is.", flush=True)
        written[card] = old.get(card, "")
        files.remove(card)
    # before the list existed: weights of other pieces would be read in place of these
    parts = {name.split("/")[0] for name in files if "/" in name}
    stale = {str(f.relative_to(final)) for part in parts for f in final.glob(f"{part}/*model*.safetensors*")}
    (final / index).unlink(missing_ok=True)
    for name in ({*old} if old else stale) - {*files, card}:
        if (final / name).resolve().is_relative_to(final.resolve()):  # the list is a file that anyone may edit
            (final / name).unlink(missing_ok=True)
    final.mkdir(parents=True, exist_ok=True)
    write_json(listed, {**old, **written})
    for name in sorted(files, key=lambda name: name == index):
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, final / name)
    write_json(listed, written)
