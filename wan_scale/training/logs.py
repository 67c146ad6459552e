"""What is written while training runs: a line every few updates, and alarms in words.

A loss that falls says nothing here; these numbers do.

| number | what it should do |
|---|---|
| tm_mf | stays below 1 (it is bounded); need not fall |
| vsd | nothing: only its gradient means something |
| fake | falls at first, then follows the student |
| disc, accuracy | accuracy 0.55 to 0.9; at 0.5 it has learnt nothing, at 1 the student gets no gradient from it |
| gradient norm | no trend upward |
| motion, contrast | near 1: the student's, as a share of the data's; far below 1 is a still or a washed-out picture |
| peak | near 1: the largest numbers (99.9 % quantile), as a share of the data's; far above, latents run hot |
| diversity | near 1: distance of two seeds of a prompt, as a share of two data clips'; near 0: mode collapse |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import torch

from wan_scale.cost.sizes import GB
from wan_scale.data.files import atomic
from wan_scale.training import kept

KINDS = {"tm_mf": "stage1", "vsd": "student", "kd": "kd", "denoising": "teacher"}  # loss term: kind of update


class Log:
    """JSON lines in `path`, and TensorBoard beside it where it is installed.

    At the start, lines after `step` (of a lost run) go.
    """

    def __init__(self, path: Path, step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        with atomic(path) as file:
            file.write("".join(line + "\n" for line in lines if 0 <= step_of(line) <= step).encode())
        self.path, self.board, self.full = path, None, False
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # optional
            return
        self.board = SummaryWriter(str(path.parent / "tensorboard" / path.stem), purge_step=step + 1)

    def write(self, step: int, values: dict) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as e:  # lines are lost, not hours
            if not self.full:
                print(f"\n{self.path} cannot be written ({kept.reason(e)}); the training goes on.", flush=True)
            self.full = True
        for key, value in {**values, **values.get("preview", {})}.items():
            if self.board and isinstance(value, (int, float)):
                self.board.add_scalar(key, value, step)


def step_of(line: str) -> int:
    """Step of a log line, -1 for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


class Memory:
    """Peak memory of the first update of each kind on this GPU, beside what `plan` said; nothing on a CPU.

    planned: bytes by kind of update (plan()["peak"]). `most`: of all updates since it was set to 0.
    """

    most: ClassVar = {"allocated_gb": 0.0, "reserved_gb": 0.0}

    def __init__(self, device, planned: dict):
        self.device, self.planned, self.seen = device, planned, set()

    def after(self, terms: dict) -> dict | None:
        """After an update of these loss terms: {"update", "allocated_gb", "reserved_gb", "planned_gb"}, or None."""
        if self.device.type != "cuda":
            return None
        kind = next((kind for term, kind in KINDS.items() if term in terms), "critic")
        found = {"update": kind, "allocated_gb": torch.cuda.max_memory_allocated(self.device) / GB}
        found["reserved_gb"] = torch.cuda.max_memory_reserved(self.device) / GB
        torch.cuda.reset_peak_memory_stats(self.device)  # the next may be another net's
        self.most.update({key: max(value, found[key]) for key, value in self.most.items()})
        if kind in self.seen:
            return None
        self.seen.add(kind)
        return found | ({"planned_gb": self.planned[kind] / GB} if kind in self.planned else {})


class Accuracy:
    """Share of the discriminator's logits with the right sign in the last critic update, which calls it in turn on real
    and on fake.
    """

    def __init__(self, discriminator):
        self.calls, self.last = [], None
        discriminator.register_forward_hook(lambda net, args, out: self.calls.append(out.detach()))

    def value(self, critic_update: bool) -> float | None:
        """After an update: of that one if it was the critics', else of the last that was."""
        calls, self.calls = self.calls, []
        if critic_update and calls:
            real, fake = torch.cat(calls[0::2]), torch.cat(calls[1::2])
            self.last = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean()).item()
        return self.last


def clip_numbers(x: torch.Tensor) -> dict:
    """Of latents (B, C, T, H, W): mean absolute difference of neighbouring frames, standard deviation, 99.9 % quantile
    of |x|.
    """
    x = x.float()
    motion = (x[:, :, 1:] - x[:, :, :-1]).abs().mean().item() if x.shape[2] > 1 else 0.0
    return {
        "motion": motion,
        "contrast": x.std().item(),
        "peak": x.abs().flatten().sort().values[int(0.999 * (x.numel() - 1))].item(),
    }


def preview_numbers(samples: torch.Tensor, data: torch.Tensor) -> dict:
    """Of samples (P, 2, C, T, H, W), two seeds a prompt, as shares of what data (P, C, T, H, W) shows; 1 is like the
    data.
    """
    ours, theirs = clip_numbers(samples.flatten(0, 1)), clip_numbers(data)
    shares = {key: ours[key] / max(theirs[key], 1e-9) for key in ours}
    apart = (samples[:, 0] - samples[:, 1]).float().pow(2).mean().sqrt().item()
    between = (data - data.roll(1, 0)).float().pow(2).mean().sqrt().item() if len(data) > 1 else 0.0
    return {**shares, "diversity": apart / between if between else 1.0}


def alarms(numbers: dict) -> list[str]:
    """What a person should look at now, in words; empty when nothing stands out."""
    rules = [  # number, when it is bad, what is wrong, what to do
        ("motion", lambda v: v < 0.3, "clips hardly move ({:.0%} of the data's motion)",
         ": static collapse; raise dmd_shift or lower the rate"),
        ("contrast", lambda v: v > 1.6, "clips are over-saturated ({:.0%} of the data's contrast)",
         ": lower stage2_guidance or the rate"),
        ("contrast", lambda v: v < 0.5, "clips are washed out ({:.0%} of the data's contrast)",
         ": they are means of clips, not clips"),
        ("peak", lambda v: v > 2.0, "latents run hot ({:.0%} of the data's 99.9 % quantile)",
         ": lower the rate or stage2_guidance"),
        ("diversity", lambda v: v < 0.15, "two seeds of a prompt give one clip (distance {:.0%} of the data's)",
         ": mode collapse; raise dmd_shift"),
        ("accuracy", lambda v: v > 0.97, "the discriminator is right in {:.0%} of cases and teaches nothing",
         "; lower its rate or gan_weight"),
        ("skipped", lambda v: v > 0, "{} updates were skipped because a gradient was not finite", ""),
    ]  # fmt: skip
    found = []
    for key, bad, wrong, advice in rules:
        if numbers.get(key) is not None and bad(numbers[key]):
            found.append(wrong.format(numbers[key]) + advice)
    return found
