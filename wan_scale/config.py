"""One dataclass = settings = command line; a preset holds only what differs from Table 7 at 1.3B."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import tmd_minimal as tmd
from toys.ladder import option

# What a machine or a run's look decides, and no weight depends on: may change between two starts of the same training.
OF_THE_MACHINE = (
    "model out data prompts videos device precision tf32 checkpointing attn compile save_every preview_every preview_prompts log_every "
    "graph context_parallel shard_over offload_teacher gpus card_gb tflops rates bench_minutes verify "
    "data_steps data_guidance sampler clips shard_size kd_clips skip_layer student "
    "sample_prompts samples_per_prompt vbench_info vbench_results"
).split()
# Settings that only these phases look at: another value is no other run for the rest.
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
class Wan:
    """Settings of the whole ladder. Defaults are the paper's for 1.3B (Table 7) where it gives one."""

    model: str = option("", "folder of Wan2.1-T2V weights in the Hugging Face layout; the preset tiny makes its own")
    out: str = option("runs/wan", "everything is written below this folder; the presets have their own")
    data: str = option("", "folder of latent shards; empty: OUT/data")
    prompts: str = option("", "prompt file: one prompt a line, or JSONL with prompt and seed")
    videos: str = option("", "data from a folder of videos with captions, instead of the teacher's own samples")

    frames: int = option(81, "frames of a clip, 4 k + 1; paper: 81")
    height: int = option(480, "pixels, a multiple of 16; paper: 480")
    width: int = option(832, "pixels, a multiple of 16; paper: 832")
    flow_shift: float = option(3.0, "timestep shift of the teacher's sampler (Wan's own for 480p)")
    sampler: str = option("unipc", "teacher's sampler: unipc or euler")
    data_steps: int = option(50, "teacher's sampling steps")
    data_guidance: float = option(5.0, "teacher's guidance in sampling")
    clips: int = option(0, "make only so many clips (0: one for every prompt)")
    shard_size: int = option(64, "clips a shard")
    verify: bool = option(False, "compare checksums of shards when training first reads them, also where data exceed 50 GB")
    kd_clips: int = option(10000, "pairs for the baseline's KD warm-up (M = 1); paper: 10k")
    skip_layer: int = option(10, "block that skip-layer guidance leaves out in KD pairs, -1 for none; paper: 10")

    M: int = option(2, "outer transitions; paper: 1, 2")
    N: int = option(2, "inner steps of the flow head; paper: 2, 4")
    H: int = option(5, "blocks of the flow head; paper: 5")
    fusion: str = option("gated", "gated or concat; paper: gated")
    outer_shift: float = option(10.0, "timestep shift of the outer grid; paper: 10")
    inner_shift: float = option(10.0, "timestep shift of the inner grid; paper: 10")

    global_batch: int = option(64, "clips an update, over all GPUs and accumulation; paper: 64")
    micro_batch: int = option(1, "clips a GPU holds at once")
    stage1_updates: int = option(3000, "updates of stage 1; paper: 3k")
    stage1_lr: float = option(3e-5, "learning rate of stage 1; paper: 3e-5 (1.3B), 1e-5 (14B)")
    stage1_guidance: float = option(3.0, "guidance of stage 1; paper: 3")
    adaptive_c: float = option(1.0, "c / d of the adaptive loss; paper: 1 (1.3B), 1e-5 (14B)")
    kd_updates: int = option(10000, "updates of the baseline's KD warm-up, at M = 1; paper: 10k (1.3B), 5k (14B)")
    kd_lr: float = option(7e-5, "learning rate of the KD warm-up; paper: 7e-5")
    stage2_iterations: int = option(0, "iterations of stage 2 (0: the paper's for this M: 4k, at M = 1 12k; 14B 1k, 5k)")
    stage2_lr: float = option(1e-5, "learning rate of student, fake score and discriminator; paper: 1e-5")
    stage2_guidance: float = option(5.0, "teacher's guidance in stage 2; paper: 5")
    dmd_shift: float = option(5.0, "timestep shift of t in stage 2; paper: 5")
    gan_weight: float = option(0.03, "weight of the GAN term; paper: 0.03")
    taps: str = option("15,22,29", "teacher blocks whose features the discriminator sees; paper: 15,22,29 (1.3B), 19,29,39 (14B)")
    disc_width: int = option(384, "width of the discriminator's convolutions (384: 67.9 M at 1.3B)")
    lora: int = option(0, "rank of LoRAs on one frozen transformer, which student, teacher and fake score share; 0: full training")
    lora_scale: float = option(10.0, "strength of the adapters: B A counts so many times")
    teacher_updates: int = option(0, "updates of `teacher`: flow matching from scratch, for folders made by hand")
    teacher_lr: float = option(1e-3, "its learning rate")

    student: str = option("tmd", "whom sample, export and eval take: tmd, dmd2v or teacher")
    sample_prompts: int = option(16, "sample so many of the prompts, the first (0: all)")
    samples_per_prompt: int = option(1, "videos a prompt, each from its own seed (VBench asks for 5)")
    vbench_info: str = option("", "VBench_full_info.json, to sample VBench's prompts under VBench's file names")
    vbench_results: str = option("", "folder of VBench's *_eval_results.json, to be scored")

    seed: int = option(0, "seed of weights, data order and draws")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "bf16 (compute; the weights stay fp32) or fp32; auto: bf16 on a GPU")
    tf32: bool = option(
        False, "let the float32 finite difference of stage 1 use TF32 on a GPU: several times faster there, 10 bits of mantissa"
    )
    checkpointing: str = option(
        "none",
        "what of a block the backward pass computes again: none, selective (all but attention), full, or auto: by memory (1.3b, 14b)",
    )
    attn: str = option("auto", "attention backend: native, cudnn, flash or flex; auto: the fastest on this card, measured at the start")
    graph: str = option("auto", "replay the flow head as a CUDA graph in sampling: off, or auto: on a GPU")
    compile: str = option("auto", "on or off: compile the blocks; auto: on a GPU")
    shard_over: int = option(0, "GPUs over which one copy of the weights is cut; the other GPUs repeat it (HSDP); 0: all")
    offload_teacher: bool = option(False, "keep the frozen teacher in host memory and fetch it block by block")
    context_parallel: int = option(1, "GPUs that share one clip, by heads and tokens: 1, 2, 4 or 8 (1.3B: 12 heads, so 1, 2 or 4)")
    save_every: int = option(100, "updates between two checkpoints")
    preview_every: int = option(250, "updates between two previews of fixed prompts, with alarms")
    preview_prompts: int = option(4, "prompts of a preview, two seeds each")
    log_every: int = option(10, "updates between two lines of the log")
    gpus: int = option(1, "GPUs, for plan")
    card_gb: float = option(141.0, "memory of a card in GB, for plan")
    tflops: float = option(400.0, "achieved bf16 TFLOP/s of a card, for plan")
    rates: str = option("", "JSON that `bench` wrote on such a card: plan with its measured rates instead of --tflops")
    bench_minutes: float = option(9.0, "minutes of bench: a case that would start later is left out")

    def __post_init__(self):
        if self.frames % 4 != 1 or self.frames < 1:
            raise ValueError(f"frames is {self.frames}; Wan's VAE takes 4 k + 1 frames (81, or 9 for a try).")
        if self.height % 16 or self.width % 16 or min(self.height, self.width) < 16:
            raise ValueError(f"clips of {self.height}x{self.width} do not fit Wan's patches; height and width must be multiples of 16.")
        least = {"micro_batch": 1, "global_batch": 1, "shard_size": 1, "data_steps": 1, "gpus": 1, "save_every": 1, "log_every": 1}
        least |= {"context_parallel": 1, "lora": 0, "shard_over": 0}
        for name, low in (least | {"clips": 0, "stage1_updates": 0, "kd_updates": 0, "stage2_iterations": 0, "preview_every": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        for name in (
            "lora_scale",
            "flow_shift",
            "stage1_lr",
            "stage2_lr",
            "kd_lr",
            "teacher_lr",
            "dmd_shift",
            "card_gb",
            "tflops",
            "bench_minutes",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")
        tmd.choose("sampler", self.sampler, ("unipc", "euler"))
        tmd.choose("device", self.device, ("auto", "cpu", "cuda"))
        tmd.choose("precision", self.precision, ("auto", "bf16", "fp32"))
        tmd.choose("student", self.student, ("tmd", "dmd2v", "teacher"))
        tmd.choose("attn", self.attn, ("auto", "cudnn", "flash", "flex", "native"))
        tmd.choose("compile", self.compile, ("auto", "on", "off"))
        tmd.choose("graph", self.graph, ("auto", "off"))
        tmd.choose("checkpointing", self.checkpointing, ("auto", "none", "selective", "full"))
        if self.lora and self.offload_teacher:
            raise ValueError("with --lora the teacher is the base that all share and stays on the card; leave --offload-teacher away.")
        try:
            self.tap_blocks = tuple(int(i) for i in self.taps.split(","))
        except ValueError:
            raise ValueError(f"taps is {self.taps!r}; give block numbers with commas between, such as 15,22,29.") from None
        self.how(), self.stage1(), self.stage2()  # their own checks

    def how(self, plain: bool = False) -> WanStudentConfig:
        """The student's config; plain: of DMD2-v, the whole network as the student."""
        grid = {"M": self.M, "outer_shift": self.outer_shift, "inner_shift": self.inner_shift}
        return WanStudentConfig(**grid, N=1 if plain else self.N, H=0 if plain else self.H, fusion=self.fusion)

    def stage1(self) -> tmd.Stage1Config:
        return tmd.Stage1Config(updates=self.stage1_updates, batch=self.micro_batch, lr=self.stage1_lr, guidance=self.stage1_guidance,
                                adaptive_c=self.adaptive_c)  # fmt: skip

    def stage2(self) -> tmd.Stage2Config:
        iterations = self.stage2_iterations or (12000 if self.M == 1 else 4000)
        return tmd.Stage2Config(iterations=iterations, batch=self.micro_batch, lr=self.stage2_lr, guidance=self.stage2_guidance,
                                dmd_shift=self.dmd_shift, gan_weight=self.gan_weight)  # fmt: skip

    def planned(self, **changed) -> dict:
        """The arguments of plan.plan (but the transformer's config and rates) that are these settings, some of them `changed`."""
        same = (
            "M N H frames height width micro_batch lora gpus card_gb tflops context_parallel shard_over offload_teacher "
            "checkpointing disc_width"
        ).split()
        found = {name: getattr(self, name) for name in same}
        found |= {"batch": self.global_batch, "clips": self.clips or 500_000, "compiled": self.compile != "off"}
        found |= {"stage1": self.stage1_updates, "stage2": self.stage2().iterations, "last_tap": self.tap_blocks[-1]}
        # choice: float32 without TF32 taken to run at an eighth of the bf16 rate, with it at half (data sheets, not measured)
        found |= {"disc_checkpointing": self.checkpointing != "none", "fp32_slowdown": 2.0 if self.tf32 else 8.0}
        return found | changed

    def of_the_training(self, phase: str = "") -> dict:
        """The settings that decide the weights of a phase, under the names of their options: what its checkpoints are compared by."""
        others = {key for name, keys in OF_THE_PHASE.items() if phase and phase not in name.split() for key in keys.split()}
        left_out = {*OF_THE_MACHINE, *others}
        return {f"--{key.replace('_', '-')}": value for key, value in asdict(self).items() if key not in left_out}

    def folder(self, *parts: str) -> Path:
        return Path(self.out).joinpath(*parts)

    @property
    def shards(self) -> Path:
        return Path(self.data) if self.data else self.folder("data")


TINY = dict(
    out="runs/wan-tiny", device="cpu", precision="fp32", frames=9, height=64, width=64, data_steps=6, clips=16, shard_size=8, kd_clips=8,
    skip_layer=1, H=2, taps="1,3", disc_width=8, global_batch=4, micro_batch=2, stage1_updates=12, stage1_lr=1e-4, stage2_iterations=20,
    stage2_lr=1e-4, kd_updates=6, save_every=10, preview_every=10, preview_prompts=2, log_every=2, samples_per_prompt=2,
)  # fmt: skip
BIG = dict(out="runs/wan-14b", checkpointing="auto", stage1_lr=1e-5, adaptive_c=1e-5, taps="19,29,39", disc_width=608, kd_updates=5000)
PRESETS = {"tiny": TINY, "1.3b": {"out": "runs/wan-1.3b", "checkpointing": "auto"}, "14b": BIG}
STAGE2_14B = {1: 5000}  # iterations at 14B; else 1000


def preset(name: str, **given) -> Wan:
    """A preset with the settings given on top."""
    tmd.choose("preset", name, PRESETS)
    cfg = Wan(**{**PRESETS[name], **given})
    big = STAGE2_14B.get(cfg.M, 1000) if name == "14b" else 0
    return replace(cfg, stage2_iterations=cfg.stage2_iterations or big or cfg.stage2().iterations)
