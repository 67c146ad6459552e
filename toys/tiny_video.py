"""The ladder on tiny videos: its settings, its clips and prompts, its networks, its ruler."""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

import tmd_minimal as tmd
from settings import option
from toys import video_net, video_teacher
from toys.ladder import Ladder, ToySettings
from toys.moving_shapes import EMPTY, MOTIONS, SHADES, SHAPES, World, encode
from toys.ruler import Ruler

PROMPTS = [" ".join(words) for words in itertools.product(SHADES, SHAPES, MOTIONS)]
SIZES = {
    "tiny": {},
    "small": {"frames": 16, "pixels": 32, "width": 256, "depth": 10, "heads": 8, "batch": 64, "teacher_updates": 8000,
              "kd_count": 4000, "taps": "4,7,9", "H": 3, "stage1_updates": 1500, "iterations": 5000, "teacher_lr": 1e-3,
              "samples": 960, "own_teacher": True},
}  # fmt: skip
QUICK = {"own_teacher": True, "frames": 6, "pixels": 12, "width": 32, "heads": 4, "depth": 3, "H": 1, "taps": "0,1",
         "teacher_updates": 60, "stage1_updates": 10, "iterations": 30, "batch": 16, "samples": 120, "kd_count": 32,
         "kd_steps": 4}  # fmt: skip


@dataclass
class ToyVideo(ToySettings):
    """One run of the moving shapes, sized for two CPU cores. REFERENCE.md says why a value is not the paper's."""

    out: str = option("", "output folder; default runs/toy_video/<size>", "run")
    size: str = option("", "tiny (default on a CPU) or small (default on a GPU); sets the other defaults", "run")
    frames: int = option(8, "frames of a clip", "clips")
    pixels: int = option(12, "side of a frame in pixels", "clips")
    # choice: few modes a motion, which a network this small can learn (see moving_shapes._few)
    modes: str = option("few", "paths of a motion: few directions, phases, speeds or free ones", "clips",
                        choices=("few", "free"))  # fmt: skip
    own_teacher: bool = option(False, "train a teacher here instead of the one in results/video_teacher", "teacher")
    width: int = 96
    patch_frames: int = option(2, "frames of a patch", "network", least=1)
    patch_pixels: int = option(4, "side of a patch in pixels", "network", least=1)
    heads: int = option(4, "attention heads", "network", least=1)
    M: int = 1
    batch: int = 16
    # choice: a weaker guidance than the paper's, which saturates shapes this small
    guidance: float = option(2.0, "teacher's guidance in stage 2 and in its own samples; paper: 5", "training")
    stage1_guidance: float = option(2.0, "guidance of stage 1; paper: 3", "stage 1")
    teacher_updates: int = 8000
    stage1_updates: int = option(300, "updates of stage 1, or of the baseline's KD warm-up; paper: 3000", "stage 1", 0)
    iterations: int = 1600
    # choice: learning rates for a network of a million parameters; the paper's are for 1.3 B
    teacher_lr: float = 3e-3
    stage1_lr: float = option(1e-3, "learning rate of stage 1 and of KD; paper: 3e-5", "stage 1", above=0)
    stage2_lr: float = 1e-3
    # choice: timestep shifts for a thousand numbers; the paper's are for two million
    dmd_shift: float = 1.0
    discriminator: str = option("conv3d", "discriminator heads: conv3d (paper), conv1d2d or attention", "stage 2",
                                choices=("conv3d", "conv1d2d", "attention"))  # fmt: skip
    taps: str = option("2,4", "teacher blocks that the discriminator reads, from 0; paper: 15,22,29 of 30", "stage 2")
    curve: int = option(8, "scores taken during stage 2", "run", least=0)
    samples: int = option(240, "clips per model in scores and pictures, spread over the 30 prompts", "run")
    # choice: fewer and shorter trajectories of the KD warm-up
    kd_count: int = option(1000, "teacher trajectories of the KD warm-up; paper: 10000", "baseline", least=1)
    kd_steps: int = option(25, "steps of each of them; paper: 50", "baseline", least=1)
    prompts: str = option("", "prompts of the contact sheet, separated by commas; default one per motion", "run")
    compile: bool = option(False, "compile blocks and discriminator: a minute, then faster; always on a GPU", "run")

    def __post_init__(self):
        tmd.choose("size", self.size, ("", *SIZES))
        self.size = self.size or default_size()
        self.out = self.out or f"runs/toy_video/{self.size}"
        for name in ("frames", "pixels"):
            size, patch = getattr(self, name), getattr(self, f"patch_{name}")
            if patch < 1 or size % patch:
                told = f"{name} is {size} and the patch {patch}"
                raise ValueError(f"{told}; choose {name} as a multiple of patch_{name}.")
        if self.heads < 1 or self.width % (2 * self.heads) or self.width < 6 * self.heads or self.width % 4:
            told = f"width is {self.width}; it must be a multiple of 4 and of twice the {self.heads} heads"
            raise ValueError(f"{told}, at least 6 a head (rope).")
        if not all(block.strip().isdigit() and int(block) < self.depth for block in self.taps.split(",")):
            told = f"taps is {self.taps!r}; give block numbers from 0 to {self.depth - 1}"
            raise ValueError(f"{told}, as in 2,4.")
        if self.samples < 4 * len(PROMPTS):
            told = f"samples is {self.samples}; the ruler needs at least {4 * len(PROMPTS)}"
            raise ValueError(f"{told}, four clips for each prompt.")
        World(self.frames, self.pixels, self.modes), [encode(prompt) for prompt in self.shown()]  # their own checks
        if unnamed := [prompt for prompt in self.shown() if prompt not in PROMPTS]:
            raise ValueError(f"the prompt {unnamed[0]!r} leaves a word open; name shade, shape and motion.")
        super().__post_init__()
        if not self.own_teacher:
            published_teacher(self)

    def shown(self) -> list[str]:
        """Prompts of the contact sheet."""
        if self.prompts:
            return [prompt.strip() for prompt in self.prompts.split(",")]
        return [f"{SHADES[(i + 1) % 2]} {SHAPES[i % 3]} {motion}" for i, motion in enumerate(MOTIONS)]

    def stage1_config(self, **kw) -> tmd.Stage1Config:
        return super().stage1_config(**{"guidance": self.stage1_guidance, **kw})


def published_teacher(cfg: ToyVideo, blocks: int = 0) -> tuple[dict, dict]:
    """Weights and facts of the teacher in results/video_teacher for clips of so many frames, or of its smaller sibling
    of so many blocks.

    ValueError if there is none, or it was made for other clips or networks.
    """
    depth, frames = blocks or video_teacher.NETWORK["depth"], cfg.frames
    if not (video_teacher.PUBLISHED / video_teacher.name_of(frames, depth)).is_dir():
        known = ", ".join(sorted(folder.name for folder in video_teacher.PUBLISHED.iterdir() if folder.is_dir()))
        told = f"frames is {frames}" + (f" and blocks {blocks}" if blocks else "")
        raise ValueError(f"{told}; results/video_teacher has {known}. Choose one, or train a teacher: --own-teacher.")
    weights, facts = video_teacher.load_weights(frames, depth)
    patch_frames, patch_pixels, _ = facts["network"]["patch"]
    needed = {**facts["clips"], **facts["network"], "patch_frames": patch_frames, "patch_pixels": patch_pixels}
    del needed["patch"]
    mine = vars(cfg) | ({"depth": blocks} if blocks else {})
    other = [f"--{key.replace('_', '-')} {value}" for key, value in needed.items() if mine[key] != value]
    if other:
        told = f"the teacher in results/video_teacher is for {', '.join(other)}"
        raise ValueError(f"{told}; leave that as it is, or train a teacher with --own-teacher.")
    return weights, facts


def default_size() -> str:
    """The size that fits this machine."""
    return "small" if torch.cuda.is_available() else "tiny"


class VideoLadder(Ladder):
    """The ladder of moving shapes: clips, prompts, video transformers, the ruler."""

    settings = ToyVideo
    of_teacher = ("seed", "frames", "pixels", "modes", "patch_frames", "patch_pixels", "width", "depth", "heads",
                  "batch", "teacher_updates", "teacher_lr")  # fmt: skip
    teacher_decay = video_teacher.RECIPES["8-frames"]["decay"]
    only_shown, kd_chunk, curve_samples = ("prompts", "curve"), 1000, 10_000

    def __init__(self, cfg: ToyVideo):
        super().__init__(cfg)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            self.precision = self.precision_of("cuda")
        if cfg.compile or self.device == "cuda":
            compile_networks()
        self.world = World(cfg.frames, cfg.pixels, cfg.modes)
        self.ruler = Ruler(self.world)
        self.kd_count, self.kd_steps = cfg.kd_count, cfg.kd_steps
        self.taps = tuple(sorted({int(block) for block in cfg.taps.split(",")}))
        self.c_neg = torch.full((3,), EMPTY, device=self.device)
        every = torch.stack([encode(prompt) for prompt in PROMPTS]).to(self.device)
        self.c = every.repeat(-(-cfg.samples // len(PROMPTS)), 1)  # every prompt equally often
        g = torch.Generator(self.device).manual_seed(cfg.seed + 10_000)
        self.x = self.world.draw(len(self.c), g, self.c)[0]
        self.x_1 = torch.randn(self.x.shape, generator=g, device=self.device)

    @staticmethod
    def uncompiled():
        return uncompiled()

    @staticmethod
    def precision_of(device: str):
        """bf16 products under fp32 master weights; tmd_minimal keeps states and losses in fp32.

        NO CACHE: the context spans a whole training, and cached casts would stay the weights of its first step.
        """
        return partial(torch.autocast, device, dtype=torch.bfloat16, cache_enabled=False)

    def data(self, n, generator):
        """What the trainings draw from: clips (n, 1, T, H, W) and prompts (n, 3)."""
        return self.world.draw(n, generator)[:2]

    def fit_teacher(self, folder, **run):
        """The teacher of results/video_teacher, trained once; with own_teacher one that is trained here."""
        if self.cfg.own_teacher:
            return super().fit_teacher(folder, **run)
        (weights, facts), teacher = published_teacher(self.cfg), self.network()
        teacher.load_state_dict(weights)
        curve = facts["curve"][-1]
        return teacher.requires_grad_(False), {"seconds": curve["seconds"], "updates": curve["updates"]}

    def network(self):
        cfg = self.cfg
        patch = (cfg.patch_frames, cfg.patch_pixels, cfg.patch_pixels)
        return video_net.VideoDiT(1, cfg.width, cfg.depth, cfg.heads, patch, words=EMPTY).to(self.device)

    def smaller(self, blocks: int):
        """Where a student of fewer blocks than its teacher starts: the published network of that size."""
        net = video_teacher.network(blocks).to(self.device)
        net.load_state_dict(published_teacher(self.cfg, blocks)[0])
        return net

    def discriminator(self, kind: str | None = None):
        return video_net.VideoDiscriminator(self.cfg.width, len(self.taps), kind or self.cfg.discriminator).to(
            self.device
        )

    def floor(self) -> dict:
        """The score of the data itself."""
        return self.score(self.x, self.c)

    def score(self, clips, c) -> dict:
        """The ruler's means, and those of each motion law under "laws"."""
        with torch.autocast(self.device, enabled=False):  # the ruler measures in fp32, also in the middle of a training
            found = self.ruler.score(clips, c)
        clips.judged = found["clips"]  # they stay with the samples, for who shows them one by one
        return {k: v for k, v in found.items() if k not in ("clips", "prompts")}

    def judged(self, clips) -> dict:
        """The ruler's scores of each clip of this run's prompts: what `score` left with them, or measured now."""
        if not hasattr(clips, "judged"):
            self.score(clips, self.c[: len(clips)])
        return clips.judged


def published() -> tuple[VideoLadder, dict]:
    """The run that results/ shows: its ladder, its teacher and its students "stage1", "tmd" and "dmd2v"."""
    results = Path(__file__).resolve().parents[1] / "results/toy_video"
    cfg = ToyVideo(**json.loads((results / "metrics.json").read_text(encoding="utf-8"))["config"])
    bench, how = VideoLadder(cfg), cfg.student_config()
    found = {"teacher": bench.fit_teacher(results)[0]}
    for name, state in tmd.safe_load(results / "weights.pt").items():
        plain, net = name == "dmd2v", bench.network()
        found[name] = tmd.PlainStudent(net) if plain else tmd.TMDStudent(net, how.H, how.fusion)
        found[name].load_state_dict(state)
        found[name].requires_grad_(False)
    return bench, found


COMPILED = (video_net.DiTBlock, video_net.VideoDiscriminator)


@contextmanager
def uncompiled():
    """Within, networks run as they are, also after compile_networks."""
    forwards = [network.forward for network in COMPILED]
    for network, forward in zip(COMPILED, forwards):
        network.forward = getattr(forward, "eager", forward)
    try:
        yield
    finally:
        for network, forward in zip(COMPILED, forwards):
            network.forward = forward


@cache
def can_compile() -> bool:
    """Whether torch.compile works here: tried on one line, for it takes more than a compiler on the path."""
    try:
        return bool((torch.compile(lambda x: x.exp() + 1)(torch.zeros(8)) == 2).all())
    except Exception:  # of whichever part is missing
        return False


def compile_networks() -> None:
    """Compile a transformer block and the discriminator, once for all networks, so that elementwise passes fuse.

    ValueError where there is no compiler for the CPU.
    """
    if not torch.cuda.is_available() and not can_compile():
        raise ValueError("--compile needs a C++ compiler that works; install g++, or leave --compile out.")
    # with and without gradient, autocast (du/ds runs without), and by batch size
    torch._dynamo.config.recompile_limit = 64
    for network in COMPILED:
        if not hasattr(network.forward, "eager"):
            eager, network.forward = network.forward, torch.compile(network.forward)
            network.forward.eager = eager
