"""Settings: what cannot be is refused in one sentence that names the setting, before any work."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from settings import command
from toys.plane import Toy
from toys.tiny_video import ToyVideo
from wan_scale.config import Wan, preset
from wan_scale.cost.work import measured_rates

ROOT = Path(__file__).resolve().parents[1]
ODD = {"NaN": float("nan"), "inf": float("inf"), "-1": -1, "0": 0, "1e30": 10**30}
# Odd values that mean something, and what.
ACCEPTED = {
    ("seed", 0): "a seed",
    ("stage1_updates", 0): "no stage 1",
    ("kd_updates", 0): "no warm-up",
    ("teacher_updates", 0): "the phase asks for more",
    ("gan_weight", 0): "no GAN",
    ("H", 0): "`plan` of the baseline; training refuses it",
    ("curve", 0): "no scores on the way",
    ("clips", 0): "all",
    ("kd_clips", 0): "all",
    ("sample_prompts", 0): "all",
    ("stage2_iterations", 0): "the paper's",
    ("skip_layer", 0): "the first block",
    ("skip_layer", -1): "none",
    ("lora", 0): "train in full",
    ("shard_over", 0): "all GPUs",
    ("preview_every", 0): "no previews",
    ("read_ahead", 0): "on the spot",
    ("layers", 0): "all",
    ("data_guidance", 0): "without guidance",
    ("stage1_guidance", 0): "the negative prompt alone",
    ("stage2_guidance", 0): "the negative prompt alone",
}
TOYS = ACCEPTED.keys() - {("H", 0), ("teacher_updates", 0)} | {
    ("guidance", 0),
    ("guidance", -1),
    ("stage1_guidance", -1),
}  # any weight
TOLD_BY = {"depth": "taps"}  # blocks of a network of no depth


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("rung", [Toy, ToyVideo, Wan])
def test_every_number_of_every_rung(rung, odd):
    """NaN, inf, -1, 0 and 1e30 in every numeric setting: a sentence that names it, or listed here with a reason."""
    value = ODD[odd]
    for f in (f for f in fields(rung) if f.type in ("int", "float")):
        if (f.name, value) in (ACCEPTED if rung is Wan else TOYS):
            rung(**{f.name: value})
            continue
        with pytest.raises(ValueError, match=rf"\b({f.name}|{TOLD_BY.get(f.name)})\b") as e:
            rung(**{f.name: value})
        assert str(e.value).endswith(".") and "\n" not in str(e.value)


def test_numbers_of_another_kind():
    """A word, and a fraction where a whole number is asked for, are told as such."""
    for bad in ({"M": 1.5}, {"M": 2.0}, {"seed": "one"}, {"stage2_lr": "1e-3"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; it must be a (whole|finite) number"):
            Wan(**bad)


@pytest.mark.parametrize(
    ("bad", "words"),
    [({"taps": "3,1"}, "taps is '3,1'; give increasing"), ({"taps": "1,1"}, "taps is"), ({"taps": "1,-2"}, "taps is"),
     ({"frames": 1}, "frames is 1"), ({"seed": 2**64}, "seed is"), ({"frames": 10_000}, "4 k")],
)  # fmt: skip
def test_wans_own(bad, words):
    """Settings that once were refused after hours, or not at all."""
    with pytest.raises(ValueError, match=words):
        preset("tiny", **bad)


def test_folders(tmp_path, monkeypatch):
    """~ is the home folder, a model folder has one name however it is given, and --out is no file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "wan").mkdir()
    monkeypatch.chdir(tmp_path / "wan")
    names = [".", str(tmp_path / "wan"), "~/wan", "../wan/"]
    assert {Wan(model=name).model for name in names} == {str(tmp_path / "wan")}
    assert Wan(out="~/x").out == str(tmp_path / "x") and Toy(out="~/x").out == str(tmp_path / "x")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out in ("file", "file/below"):
        for rung in (Toy, Wan):
            with pytest.raises(ValueError, match=f"{tmp_path / 'file'} is a file; give a folder"):
                rung(out=str(tmp_path / out))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_interrupted(capsys):
    """Ctrl-C says what goes on, and names no switch that is not there."""

    def work():
        raise KeyboardInterrupt

    assert command("wan_scale", work) == 130
    assert capsys.readouterr().err == "wan_scale: interrupted; the same command goes on from the last checkpoint.\n"


@pytest.mark.parametrize("record", [{}, {"cases": []}, {"cases": {"rates": []}}, {"cases": {"rates": {"seconds": 1}}}])
def test_rates_of_another_file(record):
    """A JSON that `bench` did not write is told as such."""
    with pytest.raises(ValueError, match="give a JSON that"):
        measured_rates(record)


# ---- Text is UTF-8 whatever the locale says --------------------------------------------------------------------------

FOLDERS = ("", "toys", "wan_scale", "tutorials", "results")  # tests write ASCII


def without_encoding(text: str) -> list[int]:
    """Lines that open a text file in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
        builtin = isinstance(node.func, ast.Name) and name == "open"
        modes = [a.value for a in node.args[builtin:] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        modes += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
        positional = len(node.args) > {"read_text": 0, "write_text": 1}.get(name, 9)
        if (builtin and not any("b" in mode for mode in modes)) or (
            name in ("read_text", "write_text") and not positional
        ):
            found.append(node.lineno)
    return found


def test_text_is_utf8():
    """No text file is read or written in the locale's encoding."""
    files = [file for f in FOLDERS for file in (ROOT / f).glob("**/*.py" if f else "*.py")]
    found = {str(file): lines for file in files if (lines := without_encoding(file.read_text(encoding="utf-8")))}
    assert len(files) > 50 and not found


def test_the_search_can_fail():
    """It finds each way to leave the encoding open, and no other."""
    bad = "open(p)\nopen(p, 'w')\np.read_text()\np.write_text(x)\np.read_text(errors='replace')\nopen(p, mode='a')"
    assert without_encoding(bad) == [1, 2, 3, 4, 5, 6]
    good = "open(p, 'rb')\nopen(p, encoding='utf-8')\np.read_text('utf-8')\np.write_text(x, 'utf-8')\ntar.open(p)"
    assert without_encoding(good) == []
