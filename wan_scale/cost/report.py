"""A plan as text.

print(report("1.3b", gpus=8, card_gb=80))
"""

from __future__ import annotations

import tmd_minimal as tmd
from wan_scale.cost.memory import RESERVE
from wan_scale.cost.plan import advice, duration, plan
from wan_scale.cost.sizes import GB
from wan_scale.cost.work import UNITS

PUBLISHED = (  # clips that `data --from` reads: name, number, (frames, height, width), what else to know
    ("rCM, Wan2.1 14B", 250_000, (81, 480, 832), "2.1 TB; licence CC-BY-NC-4.0: not for commercial use"),
    ("FastVideo Wan-Syn", 600_000, (77, 448, 832), "raw latents, normalised on reading; see its page for the licence"),
)


def report(model: str | dict = "1.3b", **settings) -> str:
    """The plan as text: what it needs, whether it fits and what to change, how long it takes. `settings` are plan's."""
    p = plan(model, **settings)
    s, whole, L = p["settings"], p["flops"]["whole"], p["L"]
    gpus, M, N, H = s["gpus"], s["M"], s["N"] if s["H"] else 1, s["H"]
    million, tera = (lambda n: f"{n / 1e6:,.1f} M"), (lambda n: f"{n / 1e12:,.4g}")
    titles = {"stage1": "stage 1", "student": "stage 2, student", "critic": "stage 2, critics"}
    columns = [kind for kind in titles if kind in p["memory"]]
    row = lambda label, cell: f"  {label:<42}" + "".join(f"{cell(kind):>18}" for kind in columns)
    names = lambda found, order: dict.fromkeys(term for kind in order for term in found[kind])
    table = lambda found, order, cell: [
        row(term, lambda kind, term=term: cell(found[kind][term]) if term in found[kind] else "")
        for term in names(found, order)
    ]
    added = p["student"]["total"] - p["student"]["teacher"]
    clip = f"{s['frames']} frames of {s['height']}x{s['width']}"
    machine = f"{gpus} GPU{'s' * (gpus > 1)} of {s['card_gb']:g} GB"
    trained = {"student": p["lora"]["own"] + p["lora"]["student"], "fake score": p["lora"]["fake"]}
    counts = ", ".join(f"{who} {million(n)}" for who, n in trained.items())
    thin = [f"  LoRA of rank {s['lora']} on a shared base; trained: {counts}"] if s["lora"] else []
    K = s["context_parallel"]
    cut = f" {K} that share a clip" if K > 1 else ""
    source = f"Estimates from FLOP counts at {s['tflops']:g} TFLOP/s (bf16) a GPU, not measured."
    if rate := settings.get("rates"):
        speeds = [f"{unit} {rate[unit] / 1e12:,.3g}" for unit in UNITS]
        first, rest = ", ".join(speeds[:4]), ", ".join(speeds[4:])
        source = f"Times from rates measured on {rate['on']}, in T/s:\n{first},\n{rest}."
    mode = p["checkpointing"]
    kept = {"none": "everything", "selective": "its input and attention's output", "full": "its input alone"}[mode]
    kept = f"keeps {kept}"
    chosen = " (chosen: the fastest that fits)" if p["chosen"] and p["fits"] else ""
    parts = p["flops"]
    split = f"; backbone {tera(parts['backbone']['total'])}, flow head {tera(parts['head']['total'])}" if H else ""
    verdict = lambda kind: "fits" if p["peak"][kind] <= p["limit"] else "TOO MUCH"

    lines = [
        f"Plan for {p['name']}: {'TMD' if H else 'DMD2-v'} with M = {M}, N = {N}, H = {H} of {L} blocks,",
        f"clips of {clip} ({p['tokens']:,} tokens).",
        f"A global batch of {s['batch']} on {machine}, {s['micro_batch']} at a time on each{cut}.",
        source,
        "Times leave out communication, optimizer steps, reading, VAE and text encoder.",
        "Memory of activations is estimated. A GB is 2^30 bytes.",
        f"Activation checkpointing: {mode}{chosen}.",
        f"A block {kept} for the backward pass.",
        "",
        *data(p),
        "Parameters",
        f"  teacher        {million(p['parameters']['total']):>12}   {L} blocks of {million(p['parameters']['block'])}",
        f"  student        {million(p['student']['total']):>12}   the teacher and {million(added)} of the flow head",
        f"  discriminator  {million(p['discriminator']['parameters']):>12}",
        *thin,
        "",
        f"One forward: {tera(whole['total'])} TFLOP "
        f"({tera(whole['linear'])} linear, {tera(whole['attention'])} attention){split}.",
        "",
        row("Memory on each GPU, GB", titles.get),
        *table(p["memory"], reversed(columns), lambda size: f"{size / GB:,.1f}"),
        row("total", lambda kind: f"{p['peak'][kind] / GB:,.1f}"),
        row(f"of {p['limit'] / GB:,.1f} (the GPU less {100 * RESERVE:g} %)", verdict),
        "",
        "It fits." if p["fits"] else f"IT DOES NOT FIT. {advice(model, **settings)}",
        "",
        row("One clip's step, in forwards of the teacher", titles.get),
        *table(p["terms"], columns, lambda t: f"{t / p['forward']:.2f}"),
        row("total", lambda kind: f"{sum(p['terms'][kind].values()) / p['forward']:.2f}"),
        row("seconds for the whole batch", lambda kind: f"{p['seconds'][kind]:,.3g}"),
        "",
        "Training",
    ]
    for kind, hours in p["hours"].items():
        count, each = p["iterations"][kind], f"{p['seconds'][kind]:,.3g} s = {duration(3600 * hours)}"
        what = f"iterations, one in {s['student_every']} the student's," if kind == "stage2" else "updates"
        lines += [f"  {kind}: {count:,} {what} of {each}, {hours * gpus:,.0f} GPU-hours"]
    total = sum(p["hours"].values())
    lines += [
        f"  in all {duration(3600 * total)}, {total * gpus:,.0f} GPU-hours",
        f"  a checkpoint of stage2 takes {p['checkpoint bytes'] / GB:,.3g} GB",
        "",
        "Sampling one clip on one GPU, transformer only",
    ]
    for (m, j), t in p["sampling"].items():
        lines += [f"  M = {m}, N = {j}: {duration(t):>9}   effective NFE {tmd.effective_nfe(m, j, H, L):.2f}"]
    lines += [
        f"  teacher, 50 x 2: {duration(p['teacher sampling'])}",
    ]
    return "\n".join(lines) + "\n"


def data(p: dict) -> list[str]:
    """Where the clips come from, in lines: published ones that need no GPU, or this teacher's own."""
    total = sum(p["hours"].values()) * p["settings"]["gpus"]
    lines = ["Data: start from published clips, which no GPU has to make", "  data --from FOLDER     read in place"]
    for name, clips, (frames, height, width), more in PUBLISHED:
        size = (frames, height, width)
        these = size == tuple(p["settings"][key] for key in ("frames", "height", "width"))
        fits = "" if these else f"; give --frames {frames} --height {height} --width {width}"
        lines += [f"    {name:<21}{clips:,} clips of {frames} frames of {height}x{width}{fits}", f"{'':<25}{more}"]
    made = f"{p['clips']:,} clips of this teacher: {p['clip hours']:,.1f} GPU-hours (training takes {total:,.0f})"
    size = f"{p['clip bytes'] / GB:,.4g} GB, latents in fp16, text embeddings in bf16 at full length"
    return [*lines, f"  data --prompts FILE    {made}", f"{'':<25}{size}", ""]
