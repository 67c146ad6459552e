"""From the JSON files of `bench` to BENCHMARKS.md: the bars, each number beside the plan's, the cost of a flow head.

    print(markdown([json.load(open("wan_scale/bench_results/1.3b-nvidia-h200-2026-11-23.json"))]))

The plan predicts from the record's own micro-benchmarks (measured_rates), so its error is that of its arithmetic, not
of a data sheet.
"""

from __future__ import annotations

import math
from pathlib import Path

import tmd_minimal as tmd
from wan_scale.cost.memory import memory
from wan_scale.cost.sizes import GB
from wan_scale.cost.work import UNITS, flops, measured_rates, step_work

RESULTS = Path(__file__).resolve().parents[1] / "bench_results"
TIME, MEMORY = 0.15, 0.10  # errors of the plan that are within the bars
WAITS = """Not measured yet: we had no GPU. `make bench-gpu` measures both sizes in nine minutes and writes this
file. It will show:

- attention backends side by side, blocks compiled and not, a stock diffusers call
- a stage 1 step with and without the finite difference; both updates of stage 2, beside the naive baseline
- sampling at five (M, N), the head as it is and as a CUDA graph: what an effective NFE costs in seconds; the VAE
- 14B on one GPU: forward, sampling and, with LoRA, stage 2
- the errors of `plan`, in time and memory, for every row it predicts
"""


def ran(record: dict, prefix: str) -> dict[str, dict]:
    """The cases whose names begin so and that were measured."""
    return {name: case for name, case in record["cases"].items() if name.startswith(prefix) and "failed" not in case}


def update(case: dict) -> float:
    """Seconds of an iteration of stage 2 by the recipe: one of the student's in five."""
    return (case["seconds"]["student"] + 4 * case["seconds"]["critic"]) / 5


# ---- The bars: a number of a record, or KeyError / ValueError where it was not measured ------------------------------


def rate_share(record: dict) -> float:
    """Share of the GPU's own bf16 matmul rate that the fastest forward reaches."""
    rates = record["cases"]["rates"]
    work = flops(record["config"], record["tokens"], H=record["H"])["whole"]["total"]
    fastest = min(case["seconds"] for case in ran(record, "forward").values())
    return work / fastest / (rates["work"]["matmul"] / rates["seconds"]["matmul"])


def against_naive(record: dict) -> tuple[float, str]:
    """How many times faster an iteration is than the naive baseline's, and both peaks of memory.

    By the fastest variant within the baseline's memory. If there is none, by the fastest of all, and the text says so.
    """
    found = ran(record, "stage 2")
    naive = found.pop("stage 2, naive")
    peak, room = (lambda case: max(case["peak_gb"].values())), max(naive["peak_gb"].values())
    fast = min(found.values(), key=lambda case: (peak(case) > 1.02 * room, update(case)))
    more = ", NOT AT EQUAL MEMORY" * (peak(fast) > 1.02 * room)
    more += ", NOT WARMED UP" * (0 in (naive.get("n"), fast.get("n")))
    return update(naive) / update(fast), f" ({peak(fast):.1f} GB against {room:.1f} GB{more})"


def rollout(record: dict) -> float:
    """Cost of the inner steps 2 to 4 over (N-1) H / L forwards, less 1, signed. A forward: the sample at M = N = 1."""
    found, all_three = [case["seconds"] for case in ran(record, "sampling").values()], {"M1N1", "M1N2", "M1N4"}
    steps = min((s for s in found if all_three <= {*s}), key=lambda s: s["M1N2"])
    return (steps["M1N4"] / steps["M1N1"] - 1) / (3 * record["H"] / record["config"]["num_layers"]) - 1


def difference(record: dict) -> tuple[float, str]:
    """What the finite difference adds to a stage 1 step: in the mean (a quarter of clips need it), and if needed."""
    with_, without = (record["cases"][name]["seconds"][""] for name in ("stage 1", "stage 1, no finite difference"))
    every = with_ / without - 1
    return (1 - 0.75 ** record["micro_batch"]) * every, f" (to a step that needs it {percent(every)})"


percent, ratio, gb, sec = "{:.0%}".format, "{:.2f}x".format, "{:.1f} GB".format, "{:.3f} s".format
of_M1N2 = lambda record: [case["seconds"].get("M1N2") for case in ran(record, "sampling").values()]
quickest = lambda record: min(s for s in of_M1N2(record) if s is not None)
stage2_peak = lambda record: max(record["cases"]["stage 2"]["peak_gb"].values())
BARS = (  # size, what, bound, whether it is the least (else the most), the number of a record, how it is written
    ("1.3b", "forward, share of the GPU's bf16 matmul rate", 0.65, True, rate_share, percent),
    ("1.3b", "stage 2 iteration against the naive baseline, at equal memory", 1.3, True, against_naive, ratio),
    ("1.3b", "stage 2 at batch 1, peak memory", 75.0, False, stage2_peak, gb),
    ("1.3b", "sample at M = 1, N = 2, transformer", 0.60, False, quickest, sec),
    ("14b", "sample at M = 1, N = 2, transformer", 3.4, False, quickest, sec),
    ("1.3b", "inner steps over (N-1) H / L, above it", 0.05, False, rollout, percent),
    ("1.3b", "finite difference, added to a stage 1 step, mean of one GPU", 0.35, False, difference, percent),
)


def bars(records: list[dict]) -> list[str]:
    """A row for each bar and record at the preset's settings: bound, measured, met or by how much missed."""
    rows = ["| size | bar | bound | measured | |", "|---|---|---|---|---|"]
    for size, what, bound, least, number, words in BARS:
        limit = f"{'at least' if least else 'at most'} {words(bound)}"
        for record in [r for r in records if r["size"] == size and not r.get("variant")] or [None]:
            try:
                value, note = found if isinstance(found := number(record), tuple) else (found, "")
            except (KeyError, ValueError, TypeError):  # a case of it failed, or there is no record
                rows.append(f"| {size} | {what} | {limit} | not measured yet | |")
                continue
            met = value >= bound if least else value <= bound
            missed = f"missed by {abs(value / bound - 1):.0%} of the bound"
            verdict = "met" + " in time alone" * ("NOT" in note) if met else missed
            found = f"{words(value)}{note}, {record['card']}, {record['date']}"
            rows.append(f"| {size} | {what} | {limit} | {found} | {verdict} |")
    return rows


# ---- The plan beside the measurements --------------------------------------------------------------------------------


def predicted(record: dict, name: str, part: str = "") -> tuple[dict, float] | None:
    """The plan's (seconds by unit of UNITS, bytes at the peak) of a case's part, by the record's own rates.

    None where the plan has no such case.
    """
    case, config, n = record["cases"][name], record["config"], record["tokens"]
    kinds = {"forward": "teacher", "sampling": "sample", "stage 1": "stage1", "stage 2": part}
    kind = next((kind for start, kind in kinds.items() if name.startswith(start)), None)
    if not kind or "failed" in case:
        return None
    training = name.startswith("stage")
    M, N = (1, record["N"]) if kind != "sample" else (int(v) for v in part[1:].split("N"))
    how = dict(N=N, H=record["H"], last_tap=record["last_tap"], lora=case.get("lora", 0), compiled=case["compiled"],
               checkpointing=case.get("checkpointing", "full"))  # fmt: skip
    shown = {"disc_flops": record["discriminator"]["flops"], "flow_map_share": float(case.get("difference", True))}
    work = step_work(config, n, kind, M=M, disc_checkpointing=True, **how, **shown)
    tf32, clips = case.get("tf32", record["tf32"]), record["micro_batch"] if training else 1
    rate = measured_rates(record, tf32, case["attn"])
    spent = dict.fromkeys(UNITS, 0.0)
    for units in work.values():
        for unit, amount in units.items():
            spent[unit] += clips * amount / rate[unit]
    d = record["discriminator"]
    disc = {"disc": d["parameters"], "disc_bytes": d["features"], "disc_live": d["live"]} if part else {}
    peak = memory(config, n, kind, micro_batch=clips, accumulated=False, **how, **disc)
    return spent, sum(peak.values())


def measured(case: dict) -> list[tuple[str, float, float | None]]:
    """(part, seconds, peak GB or None) of a case."""
    parts = case["seconds"] if isinstance(case["seconds"], dict) else {"": case["seconds"]}
    peak = case.get("peak_gb", {})
    return [(part, s, peak.get(part) if isinstance(peak, dict) else peak) for part, s in parts.items()]


def cases(record: dict) -> list[str]:
    """A row for each number: measured, planned, error, where the time goes; then how many rows are within the bars."""
    heads = "| case | seconds | plan | error | peak GB | plan | error | where the time goes, by the plan |"
    rows = [heads, "|---" * 8 + "|"]
    hit = {"time": [0, 0], "memory": [0, 0]}

    def error(what, found, guess, bound):
        hit[what][0] += abs(guess / found - 1) <= bound
        hit[what][1] += 1
        return f"{guess:.4g} | {guess / found - 1:+.0%}"

    for name, case in record["cases"].items():
        if "failed" in case:
            rows.append(f"| {name} | {case['failed']} | | | | | | |")
        for part, s, peak in measured(case) if "failed" not in case and name not in ("attention", "rates") else ():
            try:
                guess = predicted(record, name, part)
            except ValueError:  # no rates
                guess = None
            time, space, where = " | ", " | ", ""
            if guess:
                spent, total = guess[0], sum(guess[0].values())
                time = error("time", s, total, TIME)
                if peak and "graphed" not in name:  # a graph holds its own memory
                    space = error("memory", peak, guess[1] / GB, MEMORY)
                most = sorted((unit for unit in spent if spent[unit] > 0.02 * total), key=lambda unit: -spent[unit])
                where = ", ".join(f"{unit} {spent[unit] / total:.0%}" for unit in most)
            held = f"{peak:.1f}" if peak else ""
            rows.append(f"| {name} {part} | {s:.4g} | {time} | {held} | {space} | {where} |".replace("  |", " |"))
        if name != "attention":
            rows += [f"| {name} {part} | {why} | | | | | | |" for part, why in case.get("reasons", {}).items()]
    told = zip(hit.items(), (TIME, MEMORY))
    counts = [f"within {bound:.0%} for {what}: {k} of {n} rows" for (what, (k, n)), bound in told if n]
    none = "The plan predicts none of these rows."
    return [*rows, "", f"The plan's errors are {', '.join(counts)}." if counts else none]


def evaluations(record: dict) -> list[str]:
    """Effective NFE against the clock: a sample in seconds and in fastest forwards, beside M N whole stock calls."""
    samples, forwards = ran(record, "sampling"), [case["seconds"] for case in ran(record, "forward").values()]
    if not samples or not forwards:
        return []
    rows = ["| M | N | effective NFE | seconds | in forwards | M N stock calls, seconds |", "|---|---|---|---|---|---|"]
    fastest = min(samples.values(), key=lambda case: case["seconds"].get("M1N2", math.inf))["seconds"]
    stock = ran(record, "forward, stock call").get("forward, stock call")
    for part, s in sorted(fastest.items()):
        M, N = (int(v) for v in part[1:].split("N"))
        nfe = tmd.effective_nfe(M, N, record["H"], record["config"]["num_layers"])
        calls = f"{M * N * stock['seconds']:.4g}" if stock else ""
        rows.append(f"| {M} | {N} | {nfe:.2f} | {s:.4g} | {s / min(forwards):.2f} | {calls} |")
    return [*rows, ""]


def kernels(record: dict) -> list[str]:
    """Attention by backend, and the rates that the plan is calibrated with."""
    found = []
    if attention := ran(record, "attention").get("attention"):
        rows = [f"| {name} | {s:.4g} s |" for name, s in attention["seconds"].items()]
        rows += [f"| {name} | {why} |" for name, why in attention["reasons"].items()]
        taken = f"Taken: {attention['attn']} in training, {attention['attn_forward']} in sampling."
        found += ["| attention backend, one block | |", "|---|---|", *rows, "", taken, ""]
    if rates := ran(record, "rates").get("rates"):
        each = {unit: rates["work"][unit] / s / 1e12 for unit, s in rates["seconds"].items()}
        rows = [f"| {unit} | {value:,.4g} |" for unit, value in each.items()]
        found += ["| rate | TFLOP/s, TB/s |", "|---|---|", *rows, ""]
    return found


def markdown(records: list[dict]) -> str:
    """The bars over all records, then the tables of each."""
    text = [*([] if records else [WAITS]), *bars(records), ""]
    for r in records:
        frames, height, width = r["clip"]
        text += [
            f"### {r['size']} on {r['card']}",
            "",
            f"{r['date']}, torch {r['torch']}, {r['precision']}; "
            f"{frames} frames of {height}x{width}, {r['tokens']:,} tokens.",
            f"`{r['command']}`",
            "",
            *cases(r),
            "",
            *evaluations(r),
            *kernels(r),
        ]
    return "\n".join(text).rstrip() + "\n"
