"""One settings class and one command line for every rung.

Settings are a dataclass. Each field carries its help, its limits and its group:

    @dataclass
    class Toy(Settings):
        data: str = option("spirals", "data set", "data", choices=("spirals", "moons"))   # a new setting
        gan_weight: float = 0.3         # another default; help, limits and group stay those of Settings

    parser(Toy, __doc__, quick="a small run").parse_args()      # one option a field, in groups, defaults shown
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import tmd_minimal as tmd

MOST = 10**9  # of any number that has no bound of its own


def option(default, text: str, group: str = "", least=None, above=None, choices: tuple = (), most=MOST):
    """A dataclass field with its help text.

    `least` and `most` (inclusive), `above` (exclusive) and `choices` are checked.
    """
    limits = {"least": least, "above": above, "most": most}
    return field(default=default, metadata=dict(help=text, group=group, choices=choices, **limits))


@dataclass
class Settings:
    """What every rung has: a folder, a seed, the student, both stages.

    A rung adds its own fields and restates defaults that differ.

    RAISES ValueError, in one sentence, for a value outside its limits.
    """

    GROUPS: ClassVar[tuple[str, ...]] = ()  # order of the groups in --help; those not named follow as they come

    out: str = option("", "output folder", "run")
    seed: int = option(0, "seed of weights, data and draws", "run", least=0, most=2**63 - 1)
    M: int = option(2, "outer transitions; paper: 1 or 2", "student", least=1, most=1000)
    N: int = option(4, "inner steps of the flow head; paper: 2 or 4", "student", least=1, most=1000)
    H: int = option(5, "blocks in the flow head; paper: 5 of 30 (1.3B) or of 40 (14B)", "student", least=0)
    outer_shift: float = option(10.0, "timestep shift of the outer grid; paper: 10", "student", above=0, most=1000)
    inner_shift: float = option(10.0, "timestep shift of the inner grid; paper: 10", "student", above=0, most=1000)
    teacher_updates: int = option(0, "updates of the teacher", "teacher", least=0)
    teacher_lr: float = option(1e-3, "learning rate of the teacher", "teacher", above=0, most=1)
    stage1_updates: int = option(3000, "updates of stage 1 (TM-MF); paper: 3000", "stage 1", least=0)
    stage1_lr: float = option(
        3e-5, "learning rate of stage 1; paper: 3e-5 (1.3B), 1e-5 (14B)", "stage 1", above=0, most=1
    )
    stage2_lr: float = option(
        1e-5, "learning rate of student, fake score and discriminator; paper: 1e-5", "stage 2", above=0, most=1
    )
    dmd_shift: float = option(5.0, "timestep shift of t in VSD, fake score and GAN; paper: 5", "stage 2", above=0,
                              most=1000)  # fmt: skip
    gan_weight: float = option(0.03, "weight of the GAN loss; paper: 0.03", "stage 2", least=0)

    def __post_init__(self):
        self.out = os.path.expanduser(self.out)  # --out=~/x comes here as it is
        for place in (Path(self.out), *Path(self.out).parents):
            if place.exists() and not place.is_dir():
                raise ValueError(f"out is {self.out}, but {place} is a file; give a folder.")
        for f in fields(self):
            value, about = getattr(self, f.name), explained(type(self), f.name)
            if about["choices"]:
                tmd.choose(f.name, value, about["choices"])
            if f.type in ("int", "float"):
                check_number(f.name, value, f.type == "int", about)

    def without(self, *names: str) -> dict:
        """The settings as a dict, less the output folder (a machine's own) and `names`."""
        return {key: value for key, value in asdict(self).items() if key not in ("out", *names)}


def check_number(name: str, value, whole: bool, about: dict) -> None:
    """ValueError, in one sentence, unless `value` is a number within the limits of the field."""
    least, above, most = (about[key] for key in ("least", "above", "most"))
    if not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be a {'whole' if whole else 'finite'} number.")
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}.")
    if above is not None and value <= above:
        raise ValueError(f"{name} is {value}; it must be {f'above {above}' if above else 'positive'}.")
    if abs(value) > most:
        raise ValueError(f"{name} is {value}; it must be at most {most}.")


def explained(settings: type, name: str) -> dict:
    """Help, group and limits of a field; where a rung only restates a default, those of Settings."""
    own = (cls.__dict__.get("__dataclass_fields__", {}).get(name) for cls in settings.__mro__)
    return next(f.metadata for f in own if f and f.metadata)


def parser(settings: type[Settings], doc: str, **modes: str) -> argparse.ArgumentParser:
    """A command line with a switch per mode and an option per field, in the groups of the settings, defaults shown.

    Only what is given on the command line is in the result, so that a preset can stand below it.
    """
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {"": p} | {group: p.add_argument_group(group) for group in settings.GROUPS}
    for name, text in modes.items():
        p.add_argument(f"--{name}", action="store_true", help=text)
    for f in fields(settings):
        about = explained(settings, f.name)
        group = about["group"]
        if group not in groups:
            groups[group] = p.add_argument_group(group)
        # a name with _ behind it is a word of Python's own: from_ is --from
        flag, more = f"--{f.name.rstrip('_').replace('_', '-')}", {"default": argparse.SUPPRESS, "dest": f.name}
        if f.type == "bool":
            groups[group].add_argument(flag, action="store_true", help=about["help"], **more)
        else:
            shown = f.default if f.default != "" else "-"
            more |= {"type": {"int": int, "float": float, "str": str}[f.type], "metavar": f.type.upper()}
            groups[group].add_argument(flag, help=f"{about['help']} (default: {shown})", **more)
    return p


def command(name: str, work: Callable[[], None], again: str = "the same command") -> int:
    """Run `work` as a command: its exit status. Every error is one sentence on stderr."""
    try:
        work()
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {again} goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, FloatingPointError, OSError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        return 1
    return 0


def write_json(path: Path, value) -> None:
    """Atomically, so that a kill never leaves half a file."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
