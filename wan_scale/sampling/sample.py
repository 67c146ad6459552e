"""`sample`: prompts to mp4, and a grid beside the teacher. `export`: the student as a folder for from_pretrained."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import tmd_minimal as tmd
from wan_scale import speed
from wan_scale.config import Wan
from wan_scale.data.files import file_sha256
from wan_scale.data.folders import check_folder
from wan_scale.data.prompts import NEGATIVE, read_prompts
from wan_scale.model import load_transformer
from wan_scale.pictures import contact_sheet, write_video
from wan_scale.pipeline import HOW, TMDWanModel, TMDWanPipeline
from wan_scale.sampling import vbench
from wan_scale.sampling.cheap_metrics import read_video
from wan_scale.training import dist, lora, weights
from wan_scale.training.train import compute_dtype

PHASES = {"tmd": ("stage2", "stage1"), "dmd2v": ("dmd2v", "kd")}  # the last finished phase counts


def finished_student(cfg: Wan) -> tuple[Path, dict]:
    """Folder and description of the newest finished student of cfg's kind."""
    for phase in PHASES[cfg.student]:
        if (cfg.folder(phase) / "student.json").exists():
            return cfg.folder(phase), json.loads((cfg.folder(phase) / "student.json").read_text())
    raise RuntimeError(f"{cfg.out} holds no finished {cfg.student} student; run `{PHASES[cfg.student][0]}` first.")


def make_model(cfg: Wan, dtype: torch.dtype = torch.float32) -> TMDWanModel:
    """The finished student as it is exported; every weight must fit. In bf16, diffusers' float32 weights stay so."""
    folder, facts = finished_student(cfg)
    check_folder(cfg.model)
    config = json.loads((Path(cfg.model) / "transformer" / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    model = TMDWanModel(config, {key: facts[key] for key in HOW}, facts["recipe"] | {"phase": facts["phase"]})
    state = load_file(folder / "student.safetensors")
    if facts["recipe"].get("--lora"):
        state = lora.merged(load_transformer(cfg.model), state, facts["recipe"]["--lora-scale"])
    model.student.load_state_dict(state, strict=True)
    return weights.cast(model, dtype).eval()


def make_pipeline(cfg: Wan, device, teacher: bool = False, dtype: torch.dtype | None = None):
    """The student's pipeline, or the teacher's stock one, with the folder's text encoder and VAE (always float32)."""
    from diffusers import AutoencoderKLWan, WanPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()  # of loading parts
    check_folder(cfg.model)
    dtype = dtype or compute_dtype(cfg, device)
    vae = AutoencoderKLWan.from_pretrained(cfg.model, subfolder="vae", dtype=torch.float32)  # as Wan's authors decode
    if teacher:
        pipe = WanPipeline.from_pretrained(cfg.model, vae=vae, dtype=dtype)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=cfg.flow_shift)
    else:
        parts = WanPipeline.from_pretrained(cfg.model, transformer=None, vae=vae, dtype=dtype).components
        keep = {key: parts[key] for key in ("tokenizer", "text_encoder", "vae", "scheduler")}
        pipe = TMDWanPipeline(**keep, transformer=make_model(cfg, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def folder_of(cfg: Wan, M: int | None = None, N: int | None = None) -> Path:
    """OUT/samples/<who>, with the grid in its name where it is not the one that was trained."""
    name = cfg.student
    if name != "teacher":
        facts = finished_student(cfg)[1]
        m, n = M or facts["M"], (N or facts["N"]) if facts["H"] else 1
        name += "" if (m, n) == (facts["M"], facts["N"]) else f"-M{m}N{n}"
    return cfg.folder("samples", name)


def planned(cfg: Wan) -> list[vbench.Video]:
    """What to sample: VBench's own list, or every prompt of the file, `samples_per_prompt` each."""
    if cfg.vbench_info:
        return vbench.plan_videos(vbench.read_prompts(cfg.vbench_info), samples=max(cfg.samples_per_prompt, 1))
    records = read_prompts(cfg.prompts)[: cfg.sample_prompts or None]
    found, number = [], Counter()  # a prompt may come again with another seed
    for record in records:
        name = "".join(ch if ch.isalnum() or ch in " ,.-_'" else "_" for ch in record["prompt"])
        name = name.encode()[:180].decode(errors="ignore")  # file systems count bytes
        for i in range(cfg.samples_per_prompt):
            k = number[record["prompt"]]
            number[record["prompt"]] += 1
            found.append(vbench.Video(record["prompt"], k, f"{name}-{k}.mp4", record["seed"] + 10_000 * i))
    (name, times), *_ = Counter(video.name for video in found).most_common(1)
    if times > 1:
        both = f"two prompts would both be {name!r}"
        raise ValueError(f"{both}; keep one of them, with samples_per_prompt for more videos of it.")
    return found


def stamp(folder: Path, cfg: Wan, teacher: bool) -> None:
    """made.json says what made a folder's videos; RuntimeError if another did: they would be scored as these."""
    made = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width, "seed": cfg.seed}
    if teacher:
        made |= {"steps": cfg.data_steps, "guidance": cfg.data_guidance, "flow_shift": cfg.flow_shift}
        made |= {"model": Path(cfg.model).resolve().name}  # "." has no name
    else:
        place, facts = finished_student(cfg)
        made |= {"phase": facts["phase"], "student": file_sha256(place / "student.safetensors")}
    path = folder / "made.json"
    if path.exists() and (old := json.loads(path.read_text())) != made:
        other = ", ".join(key for key in made if old.get(key) != made[key])
        raise RuntimeError(f"{folder} holds videos made with another {other}; move it away to sample anew.")
    dist.barrier()  # all have looked before one writes
    if dist.rank() == 0:
        path.write_text(json.dumps(made, indent=1) + "\n")


def sample(cfg: Wan, M: int | None = None, N: int | None = None) -> Path:
    """Every planned video that is not there yet, to OUT/samples/<student>/; timing.json has the seconds of each part.

    A video's name and noise depend on its prompt and number alone. M, N: other than the student was trained with.
    """
    device, teacher = dist.start(cfg.device), cfg.student == "teacher"
    folder = folder_of(cfg, M, N)
    folder.mkdir(parents=True, exist_ok=True)
    stamp(folder, cfg, teacher)
    todo = vbench.missing(folder, planned(cfg)[dist.rank() :: dist.world()])
    dist.say(f"sample: {len(todo)} videos to make on this rank, in {folder}")
    if not todo:
        dist.barrier()
        return folder
    pipe, times = make_pipeline(cfg, device, teacher), []
    config = json.loads((Path(cfg.model) / "transformer" / "config.json").read_text())
    fast = speed.chosen(cfg, config, device, compute_dtype(cfg, device), backward=False)
    speed.stock(pipe.transformer, **fast) if teacher else pipe.fast(**fast, graphed=cfg.graph != "off")
    size = {"height": cfg.height, "width": cfg.width, "num_frames": cfg.frames}
    guided = {"num_inference_steps": cfg.data_steps, "guidance_scale": cfg.data_guidance, "negative_prompt": NEGATIVE}
    more = guided if teacher else {"M": M, "N": N}
    for video in tqdm(todo, desc=f"sample {cfg.student}", disable=None if dist.rank() == 0 else True):
        g = torch.Generator().manual_seed(video.seed)
        result = pipe(video.prompt, generator=g, **size, **more)
        write_video(result.frames[0], folder / video.name)
        times.append(getattr(pipe, "seconds", {}))
    if dist.rank() == 0 and not teacher:
        how, layers = pipe.transformer.how, pipe.transformer.layers
        m, n = M or how.M, N or how.N
        facts = {"M": m, "N": n, "effective_nfe": tmd.effective_nfe(m, n, how.H, layers), "videos": len(times)}
        facts |= {**size, "device": str(device)}
        median = {part: float(np.median([t[part] for t in times])) for part in times[0]}
        (folder / "timing.json").write_text(json.dumps({**facts, "median_seconds": median}, indent=1) + "\n")
    dist.barrier()
    return folder


def grid(cfg: Wan, folders: dict[str, Path], prompts: int = 4) -> Path:
    """samples/grid.png and grid.mp4: every model's video of the first prompts, side by side.

    folders: {name: folder of mp4s}.
    """
    have_all = lambda video: all((folder / video.name).exists() for folder in folders.values())
    videos = [v for v in planned(cfg) if v.index == 0 and have_all(v)][:prompts]
    if not videos:
        raise RuntimeError("there is no prompt of which every model has a video; run `sample` for each of them first.")
    clips = {(v.name, who): read_video(folder / v.name).numpy() for v in videos for who, folder in folders.items()}
    first = next(iter(folders))
    path = cfg.folder("samples", "grid.png")
    rows = [(v.prompt if who == first else "", who, clips[v.name, who]) for v in videos for who in folders]
    contact_sheet(rows, path)
    # prompts across, models down
    moving = np.concatenate([np.concatenate([clips[v.name, who] for v in videos], 2) for who in folders], 1)
    write_video(moving, path.with_suffix(".mp4"))
    return path


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# {title}

A Wan2.1 student of Transition Matching Distillation (arXiv:2601.09881): {M} outer transition(s) of {N} inner step(s),
flow head of {H} blocks, effective NFE {nfe:.2f}, no guidance. Made from `{teacher}`, phase `{phase}`.

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
    """OUT/export: the student, text encoder, tokenizer, VAE and a model card, for TMDWanPipeline.from_pretrained."""
    _, facts = finished_student(cfg)
    final = cfg.folder("export" if cfg.student == "tmd" else f"export-{cfg.student}")
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_pipeline(cfg, torch.device("cpu"), dtype=torch.float32).save_pretrained(temporary, safe_serialization=True)
    name = f"TMD M{facts['M']} N{facts['N']} H{facts['H']}" if facts["H"] else "DMD2-v"
    title = f"{Path(cfg.model).name}, {name}"
    recipe = "\n".join(f"| {key} | {value} |" for key, value in facts["recipe"].items())
    plain = {key: facts[key] for key in ("M", "N", "H", "phase", "frames", "height", "width")}
    (temporary / "README.md").write_text(
        CARD.format(title=title, nfe=facts["effective_nfe"], teacher=Path(cfg.model).name, recipe=recipe, **plain)
    )
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    return final
