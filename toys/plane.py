"""The ladder in the plane: its settings, its data, its networks and its two distances."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from settings import option
from toys.ladder import Ladder, ToySettings
from toys.planar import DATA, PlanarDiscriminator, PlanarNet, dataset, off_support, sliced_wasserstein


@dataclass
class Toy(ToySettings):
    """One run of the plane. REFERENCE.md, "Differences from the paper", says why a value is not the paper's."""

    data: str = option("spirals", f"data set: {', '.join(DATA)}", "data")
    conditional: bool = option(False, "tell the networks the class (arm, moon, mode, half) of each point", "data")
    out: str = option("", "output folder; default runs/toy_2d/<data>", "run")
    guidance: float = option(1.0, "teacher's guidance in both stages, with --conditional; 1 is none", "training")
    batch: int = 256
    stage1_updates: int = 1000
    # choice: learning rates for a network of 0.1 M parameters; the paper's are for 1.3 B
    teacher_lr: float = 2e-3
    stage1_lr: float = 1e-3
    stage2_lr: float = 1e-3
    # choice: timestep shifts grow with dimension; the paper's are for two million numbers, these for two
    outer_shift: float = 1.0
    dmd_shift: float = 0.25
    gan_weight: float = 0.3  # choice: the heads are tiny
    # choice: re-noising keeps the marginals on a spread grid (trap 9 and its rows in the claims table)
    outer: str = "renoised"

    def __post_init__(self):
        dataset(self.data)  # its own check
        self.out = self.out or f"runs/toy_2d/{self.data}"
        super().__post_init__()


QUICK = {"teacher_updates": 500, "stage1_updates": 150, "iterations": 250, "samples": 2000, "width": 48, "depth": 4,
         "batch": 192}  # fmt: skip


class PlanarLadder(Ladder):
    """The ladder in the plane: points, classes, planar networks, two distances."""

    settings = Toy
    of_teacher = ("data", "seed", "width", "depth", "batch", "conditional", "teacher_updates", "teacher_lr")
    t_shift = 0.5  # choice: more time near the data, where a curve's edge is decided

    def __init__(self, cfg: Toy):
        super().__init__(cfg)
        self.set = dataset(cfg.data)
        self.c_neg = self.set.classes if cfg.conditional else None
        g = torch.Generator().manual_seed(cfg.seed + 10_000)
        self.x, self.label = self.set.draw(cfg.samples, g)
        self.c = self.label if cfg.conditional else None
        self.x_1 = torch.randn(cfg.samples, 2, generator=g)
        self.other, self.other_label = self.set.draw(cfg.samples, g)
        self.taps = (cfg.depth // 2 - 1, cfg.depth - 2)  # choice: middle and last but one, as (15, 22, 29) of 30

    def data(self, n, generator):
        """What the trainings draw from: x (n, 2) and class (n,) or None."""
        x, label = self.set.draw(n, generator)
        return x, (label if self.cfg.conditional else None)

    def network(self):
        return PlanarNet(2, self.cfg.width, self.cfg.depth, self.set.classes if self.cfg.conditional else 0)

    def discriminator(self):
        return PlanarDiscriminator(self.cfg.width, len(self.taps))

    def floor(self) -> dict:
        """The score of a second draw of the data."""
        return self.score(self.other, None if self.c is None else self.other_label)

    def score(self, points, c=None) -> dict:
        """{"swd", "off_support"} of samples against the data; of their own class, if they were told one."""
        return {
            "swd": sliced_wasserstein(points, self.x[: len(points)]),
            "off_support": off_support(self.set, points, c),
        }
