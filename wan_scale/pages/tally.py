"""`compare --tally`: several raters' answers as win rates with 95 % intervals, by question, and their agreement."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations
from pathlib import Path

from wan_scale.data.files import atomic, write_json
from wan_scale.pages.study import KEY, QUESTIONS
from wan_scale.training import kept

Z = 1.959964  # 97.5 % quantile of the normal distribution
# choice: no rates of the paper stand here; it draws them as bars, and a number read off a bar would be ours
PAPER = """The paper (arXiv:2601.09881) asks the same two questions; its rates are the bars of Fig. 5 and 21, to be read
there. It reports TMD preferred to DMD2-v at like effective NFE, most at M = 1."""


def wilson(won: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate of which `won` of n were seen; (0, 1) where none was."""
    if not n:
        return 0.0, 1.0
    rate, z = won / n, Z * Z / n
    middle, half = rate + z / 2, math.sqrt(z * (rate * (1 - rate) + z / 4))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def agreement(votes: list[list[str]]) -> dict:
    """How often two raters of a pair chose alike, from the choices of each pair; kappa is Fleiss's, 0 at chance.

    A pair counts by its pairs of raters, so that raters may have left some out. None where no pair has two raters.
    """
    alike = [one == other for choices in votes for one, other in combinations(choices, 2)]
    if not alike:
        return {"alike": None, "kappa": None, "compared": 0}
    share = sum(alike) / len(alike)
    counts = Counter(choice for choices in votes if len(choices) > 1 for choice in choices)
    chance = sum((n / counts.total()) ** 2 for n in counts.values())
    kappa = (share - chance) / (1 - chance) if chance < 1 else None  # all chose one method: nothing to compare with
    return {"alike": share, "kappa": kappa, "compared": len(alike)}


def read_answers(path: Path, study: str, pairs: int) -> dict:
    """A rater's file; ValueError, in one sentence, unless it is whole and of this study."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the answers-NAME.json files of the raters.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not whole JSON; ask the rater for the file again.") from None
    if not isinstance(found, dict) or not {"study", "rater", "session", "answers"} <= found.keys():
        raise ValueError(f"{path} holds no answers of a rater; give the answers-NAME.json files.")
    if found["study"] != study:
        raise ValueError(f"{path} answers another study ({found['study']!r}, not {study!r}); give that one's --out.")
    asked, seen = [name for name, *_ in QUESTIONS], set()
    for n, answer in enumerate(found["answers"] if isinstance(found["answers"], list) else [None], 1):
        known = isinstance(answer, dict) and type(answer.get("pair")) is int and 0 <= answer["pair"] < pairs
        if not known or answer.get("question") not in asked or answer.get("choice") not in (1, 2):
            raise ValueError(f"{path}: answer {n} is none to this study; ask the rater for the file again.")
        place = answer["pair"], answer["question"]
        if place in seen:
            raise ValueError(f"{path}: pair {place[0] + 1} is answered twice for {place[1]}; ask for the file again.")
        seen.add(place)
    return found


def counted(answers: list[dict], first: list[int]) -> dict:
    """{question: numbers} from raters' files; first[i] is the number, 1 or 2, of A's clip in pair i."""
    result = {}
    for question, *_ in QUESTIONS:
        mine = [a for file in answers for a in file["answers"] if a["question"] == question]
        votes = [["A" if a["choice"] == first[i] else "B" for a in mine if a["pair"] == i] for i in range(len(first))]
        every = [vote for choices in votes for vote in choices]
        lead = Counter((v.count("A") > v.count("B")) - (v.count("A") < v.count("B")) for v in votes if v)
        won, n, ones = every.count("A"), len(every), sum(a["choice"] == 1 for a in mine)
        result[question] = {
            "answers": n,
            "for A": won,
            "rate": won / n if n else None,
            "interval": wilson(won, n),
            "pairs to A": lead[1],
            "pairs to B": lead[-1],
            "ties": lead[0],
            "agreement": agreement(votes),
            "clip 1 chosen": ones,
            "A on the left": sum(first[a["pair"]] == 1 for a in mine),
            "interval of clip 1": wilson(ones, n),
        }
    return result


def tally(files: list[str], out: str | Path) -> str:
    """OUT/tally.json and OUT/tally.md from raters' files; returns the text.

    RAISES ValueError or RuntimeError, in one sentence, for files that are no answers to the study in OUT, or two of one
    rater; then nothing is written.
    """
    out = Path(out)
    if not files:
        raise ValueError("no answers were given; name the raters' files: compare --tally answers-*.json --out STUDY.")
    if not (out / KEY).exists():
        raise ValueError(f"{out} holds no study ({KEY} is missing); give the folder that `compare` made with --out.")
    key = kept.read(out / KEY, "without it the answers cannot be read, so restore it from a copy")
    answers, of = [], {}
    for path in map(Path, files):
        found = read_answers(path, key["study"], len(key["pairs"]))
        who = str(found["session"])  # two raters may have the same initials
        if who in of:
            raise ValueError(f"{of[who]} and {path} are of one rater, {found['rater']!r}; leave one of them out.")
        of[who] = path
        answers.append(found)
    numbers = counted(answers, [row["A is clip"] for row in key["pairs"]])
    raters = [{"rater": a["rater"], "answers": len(a["answers"])} for a in answers]
    text = table(key, numbers, raters)
    write_json(out / "tally.json", {"study": key["study"], "names": key["names"], "raters": raters, **numbers})
    with atomic(out / "tally.md") as file:
        file.write(text.encode())
    return text


def table(key: dict, numbers: dict, raters: list[dict]) -> str:
    """The tally as markdown."""
    (a, b), full = key["names"], len(QUESTIONS) * len(key["pairs"])
    percent = lambda value: "-" if value is None else f"{100 * value:.0f}%"
    span = lambda ends: f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f}%"
    lines = [
        f"{a} against {b}: {len(key['pairs'])} pairs, {len(raters)} rater{'s' * (len(raters) != 1)}.\n",
        f"| question | {a} preferred | 95 % | answers | pairs {a} : {b} : tied | raters agree | kappa |",
        "|---|---|---|---|---|---|---|",
    ]
    for question, n in numbers.items():
        found = n["agreement"]
        kappa = "-" if found["kappa"] is None else f"{found['kappa']:.2f}"
        score = f"{n['pairs to A']} : {n['pairs to B']} : {n['ties']}"
        cells = [question, percent(n["rate"]), span(n["interval"]), f"{n['for A']} of {n['answers']}", score]
        lines.append(f"| {' | '.join([*cells, percent(found['alike']), kappa])} |")
    lines.append(
        "\nIntervals are Wilson's and take answers as independent; several raters' answers to one pair are less so. "
        "A pair is tied where as many raters chose one as the other. Kappa: 0 is chance, 1 is full agreement."
    )
    for question, n in numbers.items():
        low, high = n["interval of clip 1"]
        if n["answers"] and not low <= 0.5 <= high:
            share = percent(n["clip 1 chosen"] / n["answers"])
            habit = f"\n{question}: the clip on the left was chosen in {share} of answers"
            if 2 * n["A on the left"] == n["answers"]:
                lines.append(f"{habit}. Each method stood there equally often, so this adds noise and favours neither.")
            else:
                there = percent(n["A on the left"] / n["answers"])
                lines.append(f"{habit}, and {a} stood there in {there}: a habit of raters moves the rate that way.")
    if late := [f"{r['rater']} {r['answers']} of {full}" for r in raters if r["answers"] < full]:
        lines.append(f"\nNot finished: {', '.join(late)} answers. What is there counts.")
    return "\n".join(lines) + "\n\n" + PAPER + "\n"
