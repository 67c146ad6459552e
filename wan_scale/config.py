"""One dataclass = settings = command line; a preset holds only what differs from Table 7 at 1.3B."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

import tmd_minimal as tmd
from settings import Settings, option
from wan_scale.cost.work import CHECKPOINTING

# Settings of the machine, of the log and of sampling: they may change between two starts of the same training.
OF_THE_MACHINE = (
    "model out data prompts videos device precision tf32 checkpointing attn compile ema_on_host save_every "
    "keep_checkpoints save_minutes preview_every preview_prompts log_every graph context_parallel shard_over "
    "offload_teacher gpus card_gb tflops rates bench_minutes phase layers verify data_steps data_guidance sampler "
    "clips shard_size kd_clips skip_layer from_ from_kind from_check convert read_ahead student sample_prompts "
    "samples_per_prompt vbench_info vbench_results"
).split()
PATHS = "model data prompts videos from_ rates vbench_info vbench_results".split()
# Settings that only these phases read: for the others another value is the same run.
OF_THE_PHASE = {
    "stage1": "stage1_updates stage1_lr stage1_guidance adaptive_c",
    "stage1 stage2": "N H fusion inner_shift",
    "kd": "kd_updates kd_lr",
    "stage2 dmd2v": "stage2_iterations stage2_lr stage2_guidance dmd_shift gan_weight taps disc_width",
    "stage1 stage2 kd dmd2v": "M outer_shift lora lora_scale",
    "teacher": "teacher_updates teacher_lr",
}


@dataclass
class WanStudentConfig(tmd.StudentConfig):
    """The student's readings of the equations, with both grids in float64 (Table 7: times in FP64)."""

    def __post_init__(self):
        super().__post_init__()
        self.outer_grid = tmd.make_grid(self.M, self.outer_shift, "M", torch.float64)
        self.inner_grid = tmd.make_grid(self.N, self.inner_shift, "N", torch.float64)


@dataclass
class Wan(Settings):
    """Settings of the whole ladder. Defaults are the paper's for 1.3B (Table 7) where it gives one."""

    GROUPS: ClassVar = (
        "run", "model", "clip", "data", "student", "training", "stage 1", "stage 2", "baseline", "teacher",
        "memory and speed", "sampling", "log", "plan",
    )  # fmt: skip

    out: str = option("runs/wan", "everything is written below this folder; the presets have their own", "run")
    device: str = option("auto", "auto, cpu or cuda", "run", choices=("auto", "cpu", "cuda"))

    model: str = option("", "folder of Wan2.1-T2V weights, Hugging Face layout; the preset tiny makes its own", "model")

    frames: int = option(81, "frames of a clip, 4 k + 1; paper: 81", "clip", least=5, most=10_001)
    height: int = option(480, "pixels, a multiple of 16; paper: 480", "clip", least=16, most=16_384)
    width: int = option(832, "pixels, a multiple of 16; paper: 832", "clip", least=16, most=16_384)

    prompts: str = option("", "prompt file: one prompt a line, or JSONL with prompt and seed", "data")
    data: str = option("", "folder of latent shards; empty: OUT/data", "data")
    videos: str = option("", "folder of videos with captions, to train on instead of the teacher's own samples", "data")
    from_: str = option("", "folder of published clips (rCM's, FastVideo's, FastGen's) to train on", "data")
    from_kind: str = option("", "rcm, fastvideo or fastgen, where --from holds several", "data",
                            choices=("", "rcm", "fastvideo", "fastgen"))  # fmt: skip
    from_check: str = option("all", "read all published clips once, or the first of each file", "data",
                             choices=("all", "first"))  # fmt: skip
    convert: bool = option(False, "rewrite the clips of --from into shards, instead of reading them in place", "data")
    read_ahead: int = option(4, "micro-batches that a GPU's data are read ahead", "data", least=0)
    clips: int = option(0, "make only so many clips (0: one for every prompt)", "data", least=0)
    shard_size: int = option(64, "clips a shard", "data", least=1)
    data_steps: int = option(50, "the teacher's sampling steps", "data", least=1)
    data_guidance: float = option(5.0, "the teacher's guidance in sampling; up to 1: none", "data", least=0,
                                  most=1000)  # fmt: skip
    sampler: str = option("unipc", "the teacher's sampler: unipc or euler", "data", choices=("unipc", "euler"))
    flow_shift: float = option(3.0, "timestep shift of the teacher's sampler; Wan's own for 480p: 3", "data", above=0,
                               most=1000)  # fmt: skip
    verify: bool = option(False, "compare checksums of shards and checkpoints also beyond 50 GB", "data")

    N: int = 2
    fusion: str = option("gated", "how y_s joins the main feature: gated or concat; paper: gated", "student")

    global_batch: int = option(
        64, "clips an update, over GPUs and gradient accumulation; paper: 64", "training", least=1
    )
    micro_batch: int = option(1, "clips a GPU holds at once", "training", least=1)
    lora: int = option(
        0, "rank of LoRAs on one frozen transformer for all roles; 0: train in full", "training", least=0
    )
    lora_scale: float = option(10.0, "strength of the adapters: B A counts so many times", "training", above=0,
                               most=1e4)  # fmt: skip
    precision: str = option("auto", "bf16 (compute; the weights stay fp32) or fp32; auto: bf16 on a GPU", "training",
                            choices=("auto", "bf16", "fp32"))  # fmt: skip
    save_every: int = option(100, "updates between two checkpoints", "training", least=1)
    save_minutes: float = option(30.0, "minutes between two checkpoints, where updates are slow", "training", above=0)
    keep_checkpoints: bool = option(False, "keep a phase's checkpoints when the phase that starts from it has its own",
                                    "training")  # fmt: skip

    stage1_guidance: float = option(3.0, "guidance of stage 1; paper: 3", "stage 1", least=0, most=1000)
    adaptive_c: float = option(1.0, "c / d of the adaptive loss; paper: 1 (1.3B), 1e-5 (14B)", "stage 1",
                               above=0)  # fmt: skip

    stage2_iterations: int = option(0, "iterations; 0: the paper's (4k, at M = 1 12k; 14B: 1k, 5k)", "stage 2", least=0)
    stage2_guidance: float = option(5.0, "the teacher's guidance in stage 2; paper: 5", "stage 2", least=0, most=1000)
    taps: str = option(
        "15,22,29", "teacher blocks that the discriminator sees; paper: 15,22,29; 14B: 19,29,39", "stage 2"
    )
    disc_width: int = option(384, "width of the discriminator's convolutions (384: 67.9 M at 1.3B)", "stage 2",
                            least=1, most=16_384)  # fmt: skip

    kd_clips: int = option(10000, "pairs of the KD warm-up of DMD2-v at M = 1 (0: one for every prompt); paper: 10k",
                          "baseline", least=0)  # fmt: skip
    kd_updates: int = option(10000, "updates of the KD warm-up; paper: 10k (1.3B), 5k (14B)", "baseline", least=0)
    kd_lr: float = option(7e-5, "learning rate of the KD warm-up; paper: 7e-5", "baseline", above=0, most=1)
    skip_layer: int = option(
        10, "block that skip-layer guidance leaves out in KD pairs, -1: none; paper: 10", "baseline", least=-1
    )

    teacher_updates: int = option(
        0, "updates of `teacher`: flow matching, for folders made by hand", "teacher", least=0
    )

    checkpointing: str = option(
        "none", "activation checkpointing: none, selective (keeps attention's output), full; auto: fastest that fits",
        "memory and speed", choices=("auto", *CHECKPOINTING),
    )  # fmt: skip
    shard_over: int = option(0, "GPUs that one copy of the weights is sharded over; 0: all (FSDP), fewer: HSDP",
                             "memory and speed", least=0)  # fmt: skip
    context_parallel: int = option(1, "GPUs that share one clip, by heads and tokens: 1, 2, 4 or 8 (1.3B: 1, 2 or 4)",
                                   "memory and speed", least=1)  # fmt: skip
    offload_teacher: bool = option(
        False, "keep the frozen teacher in host memory, fetched by blocks", "memory and speed"
    )
    ema_on_host: bool = option(False, "one GPU: keep the EMA in host memory", "memory and speed")
    attn: str = option("auto", "attention backend: native, cudnn, flash or flex; auto: the fastest, timed at the start",
                       "memory and speed", choices=("auto", "cudnn", "flash", "flex", "native"))  # fmt: skip
    compile: str = option("auto", "compile the blocks: on or off; auto: on a GPU", "memory and speed",
                          choices=("auto", "on", "off"))  # fmt: skip
    graph: str = option("auto", "the flow head as a CUDA graph in sampling: off, or auto: on a GPU", "memory and speed",
                        choices=("auto", "off"))  # fmt: skip
    tf32: bool = option(False, "TF32 in stage 1's float32 finite difference: its linear layers several times faster on "
                        "a GPU, 10 bits of mantissa", "memory and speed")  # fmt: skip

    student: str = option("tmd", "the student of sample, export and eval: tmd, dmd2v or teacher", "sampling",
                          choices=("tmd", "dmd2v", "teacher"))  # fmt: skip
    sample_prompts: int = option(16, "sample so many of the prompts, the first (0: all)", "sampling", least=0)
    samples_per_prompt: int = option(1, "videos a prompt, each of its own noise (VBench: 5)", "sampling", least=1)
    vbench_info: str = option(
        "", "VBench_full_info.json: sample VBench's prompts, under VBench's file names", "sampling"
    )
    vbench_results: str = option("", "folder of VBench's *_eval_results.json, to be scored", "sampling")

    log_every: int = option(10, "updates between two lines of the log", "log", least=1)
    preview_every: int = option(250, "updates between two previews with alarms; 0: none", "log", least=0)
    preview_prompts: int = option(4, "prompts of a preview, two seeds each", "log", least=1)

    gpus: int = option(1, "number of GPUs", "plan", least=1)
    card_gb: float = option(141.0, "memory of a GPU in GB", "plan", above=0)
    tflops: float = option(400.0, "bf16 TFLOP/s that a GPU achieves", "plan", above=0)
    rates: str = option("", "JSON that `bench` wrote on such a GPU: its measured rates, in place of --tflops", "plan")
    phase: str = option("", "rehearse this alone: stage1, stage2 or sampling", "plan",
                        choices=("", "stage1", "stage2", "sampling"))  # fmt: skip
    layers: int = option(0, "rehearse so many blocks (0: all), to see how it works", "plan", least=0)
    bench_minutes: float = option(9.0, "minutes of bench: a case that would start later is left out", "plan", above=0)

    def __post_init__(self):
        super().__post_init__()
        for name in PATHS:
            setattr(self, name, os.path.expanduser(getattr(self, name)))
        self.model = self.model and os.path.realpath(self.model)  # one folder has one name
        if self.frames % 4 != 1:
            raise ValueError(f"frames is {self.frames}; a video of Wan's VAE has 4 k + 1 frames (81, or 9 for a try).")
        if self.height % 16 or self.width % 16 or min(self.height, self.width) < 16:
            size = f"{self.height}x{self.width}"
            raise ValueError(f"clips of {size} do not fit Wan's patches; height and width must be multiples of 16.")
        if self.lora and self.offload_teacher:
            raise ValueError(
                "with --lora the teacher is the base that all share and stays on the GPU; drop --offload-teacher."
            )
        if self.from_ and self.videos:
            raise ValueError("both --from and --videos are given; the clips come from one of them.")
        blocks = self.taps.split(",")
        self.tap_blocks = tuple(int(i) if i.strip().isdecimal() else -1 for i in blocks)
        if self.tap_blocks[0] < 0 or list(self.tap_blocks) != sorted({*self.tap_blocks}):
            wrong = f"taps is {self.taps!r}"
            raise ValueError(f"{wrong}; give increasing block numbers with commas between, such as 15,22,29.")
        self.how(), self.stage1(), self.stage2()  # their own checks

    def how(self, plain: bool = False) -> WanStudentConfig:
        """The student's config; plain: of DMD2-v, the whole network as the student."""
        grid = {"M": self.M, "outer_shift": self.outer_shift, "inner_shift": self.inner_shift}
        return WanStudentConfig(**grid, N=1 if plain else self.N, H=0 if plain else self.H, fusion=self.fusion)

    def stage1(self) -> tmd.Stage1Config:
        return tmd.Stage1Config(updates=self.stage1_updates, batch=self.micro_batch, lr=self.stage1_lr,
                                guidance=self.stage1_guidance, adaptive_c=self.adaptive_c)  # fmt: skip

    def stage2(self) -> tmd.Stage2Config:
        iterations = self.stage2_iterations or (12000 if self.M == 1 else 4000)
        return tmd.Stage2Config(iterations=iterations, batch=self.micro_batch, lr=self.stage2_lr,
                                guidance=self.stage2_guidance, dmd_shift=self.dmd_shift,
                                gan_weight=self.gan_weight)  # fmt: skip

    def planned(self, **changed) -> dict:
        """These settings as arguments of plan.plan, some of them `changed`; the transformer and rates are not here."""
        same = (
            "M N H frames height width micro_batch lora gpus card_gb tflops context_parallel shard_over "
            "offload_teacher ema_on_host checkpointing disc_width tf32"
        ).split()
        found = {name: getattr(self, name) for name in same}
        found |= {"batch": self.global_batch, "clips": self.clips or 500_000, "compiled": self.compile != "off"}
        found |= {"stage1": self.stage1_updates, "stage2": self.stage2().iterations, "last_tap": self.tap_blocks[-1]}
        return found | {"disc_checkpointing": self.checkpointing != "none"} | changed

    def of_the_training(self, phase: str = "") -> dict:
        """The settings that decide the weights of a phase, by option: its checkpoints are compared by them."""
        left_out = {*OF_THE_MACHINE}
        for phases, names in OF_THE_PHASE.items():
            if phase and phase not in phases.split():
                left_out |= {*names.split()}
        return {f"--{key.replace('_', '-')}": value for key, value in asdict(self).items() if key not in left_out}

    def folder(self, *parts: str) -> Path:
        return Path(self.out).joinpath(*parts)

    @property
    def shards(self) -> Path:
        return Path(self.data) if self.data else self.folder("data")


TINY = dict(
    out="runs/wan-tiny", device="cpu", precision="fp32", frames=9, height=64, width=64, data_steps=6, clips=16,
    shard_size=8, kd_clips=8, skip_layer=1, H=2, taps="1,3", disc_width=8, global_batch=4, micro_batch=2,
    stage1_updates=12, stage1_lr=1e-4, stage2_iterations=20, stage2_lr=1e-4, kd_updates=6, save_every=10,
    preview_every=10, preview_prompts=2, log_every=2, samples_per_prompt=2,
)  # fmt: skip
BIG = dict(
    out="runs/wan-14b", checkpointing="auto", stage1_lr=1e-5, adaptive_c=1e-5, taps="19,29,39", disc_width=608,
    kd_updates=5000,
)  # fmt: skip
PRESETS = {"tiny": TINY, "1.3b": {"out": "runs/wan-1.3b", "checkpointing": "auto"}, "14b": BIG}
STAGE2_14B = {1: 5000}  # iterations at 14B; else 1000


def preset(name: str, **given) -> Wan:
    """A preset with the settings given on top."""
    tmd.choose("preset", name, PRESETS)
    cfg = Wan(**{**PRESETS[name], **given})
    big = STAGE2_14B.get(cfg.M, 1000) if name == "14b" else 0
    return replace(cfg, stage2_iterations=cfg.stage2_iterations or big or cfg.stage2().iterations)
