"""What a rehearsal counted beside what `plan` says: as text, and as the table of BENCHMARKS.md.

    record = run(preset("1.3b", gpus=8), WAN["1.3b"], "1.3b", "python wan_scale/run.py rehearse ...")
    print(text(record))
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date

from wan_scale.config import Wan, preset
from wan_scale.cost.memory import memory
from wan_scale.cost.plan import plan
from wan_scale.cost.sizes import GB, WAN, tokens
from wan_scale.cost.work import step_work

TERMS = {  # of the ledger: how the plan's terms that belong to it begin or end
    "weights": ("weights", "bf16"),
    "gradients": ("gradients",),
    "optimizer": ("AdamW",),
    "EMA": ("EMA",),
    "gathered": ("gathered for use",),
    "activations": (),  # all others
}
SORTS = {
    "linear": ("linear", "weight gradients", "fp32 linear"),
    "attention": ("attention", "fp32 attention"),
    "attention backward": ("attention backward",),
    "convolution": ("convolution",),
}
NAMES = {"stage1": "stage 1", "student": "stage 2, student", "critic": "stage 2, critics"}
PHASES = ("stage1", "stage2", "sampling")
LOOKED_AT = (
    "frames height width M N H micro_batch global_batch disc_width context_parallel shard_over offload_teacher "
    "ema_on_host"
).split()
NOT_COVERED = """Not covered: compiled blocks (the plan beside is of blocks that are not), the time of anything, what
libraries take for themselves (CUDA, NCCL, cuBLAS, cuDNN) and what the allocator wastes, previews and saves, the flow
head as a CUDA graph, the VAE that encodes."""


def planned(record: dict) -> dict:
    """{kind: {"memory": {term: bytes}, "flops": {sort: FLOPs of a clip}}} by the plan, in the terms of the ledger."""
    settings, config = record["settings"], record["config"]
    p, found = plan(config, **settings), {}
    for kind in record["counted"]:
        held, flops = dict.fromkeys(TERMS, 0.0), dict.fromkeys(SORTS, 0.0)
        for name, size in p["memory"][kind].items():
            held[next((term for term, ends in TERMS.items() if name.endswith(ends)), "activations")] += size
        shared = {key: settings[key] for key in ("N", "H", "last_tap", "lora", "checkpointing", "disc_checkpointing")}
        shared |= {"disc_flops": p["discriminator"]["flops"], "flow_map_share": 1.0}  # rehearsed: a clip with r < s
        work = step_work(config, p["tokens"], kind, **shared)
        for units in work.values():
            for sort, names in SORTS.items():
                flops[sort] += sum(units.get(name, 0.0) for name in names) * settings["micro_batch"]
        found[kind] = {"memory": held, "flops": flops}
    return found


def planned_sampling(record: dict) -> dict:
    """{"memory": {"weights", "activations"} (bytes), "flops"} of the student that samples a clip, by the plan."""
    s, config = record["settings"], record["config"]
    n = tokens(config, s["frames"], s["height"], s["width"])
    held = memory(config, n, "sample", H=s["H"])
    bf16 = held.pop("weights, bf16")
    work = step_work(config, n, "sample", M=s["M"], N=s["N"], H=s["H"]).values()
    flops = sum(amount for units in work for unit, amount in units.items() if unit != "bytes")
    return {"memory": {"weights": bf16, "activations": sum(held.values())}, "flops": flops}


def shallow(cfg: Wan, layers: int) -> Wan:
    """The settings for a network of fewer blocks: its last ones are the head's and the discriminator's."""
    taps = range(layers)[-len(cfg.tap_blocks) :]
    if len(taps) < len(cfg.tap_blocks) or layers < 2:
        seen = f"the discriminator sees {len(cfg.tap_blocks)} blocks"
        raise ValueError(f"layers is {layers}; {seen}, so give at least so many, or 0 for all.")
    return replace(cfg, H=min(cfg.H, layers - 1), taps=",".join(map(str, taps)))


def run(cfg: Wan, config: dict, name: str, command: str, phases=PHASES) -> dict:
    """Rehearse, with the activation checkpointing that `plan` takes; returns the record that is kept as JSON.

    config: the transformer's at full depth. Sampling alone is counted with the VAE's tiles as well.
    """
    import torch

    from wan_scale.rehearsal import sampling
    from wan_scale.rehearsal.updates import rehearse

    usual = preset(name)
    given = {key: getattr(cfg, key) for key in LOOKED_AT if getattr(cfg, key) != getattr(usual, key)}
    chosen = {"checkpointing": plan(config, **cfg.planned())["checkpointing"], "compiled": False}
    if cfg.layers:
        cfg, config = shallow(cfg, cfg.layers), config | {"num_layers": cfg.layers}
    settings = cfg.planned() | chosen
    counted = rehearse(cfg, config, settings["checkpointing"], [phase for phase in phases if phase != "sampling"])
    facts = {"date": date.today().isoformat(), "torch": torch.__version__, "command": command, "given": given}
    if "sampling" in phases:
        facts["sampling"] = sampling.count(cfg, config, tiled=len(phases) == 1)
    return {"size": name, "gpus": cfg.gpus, "lora": cfg.lora, "layers": config["num_layers"], "settings": settings,
            **facts, "config": {key: config[key] for key in WAN["1.3b"]}, "counted": counted}  # fmt: skip


def whole(record: dict) -> bool:
    """Whether all of the blocks were there."""
    return record["layers"] == WAN.get(record["size"], record["config"])["num_layers"]


def label(record: dict) -> str:
    """A name for the file of a record."""
    words = [record["size"], f"{record['gpus']}-gpus", f"lora-{record['lora']}" if record["lora"] else ""]
    words += [f"{key}-{value}".replace("_", "-").lower() for key, value in record["given"].items()]
    words += [] if whole(record) else [f"{record['layers']}-blocks"]
    kinds = [phase for phase, kind in zip(PHASES, ("stage1", "student")) if kind in record["counted"]]
    kinds = kinds or ["sampling"]
    return "-".join(filter(None, [*words, *(kinds if len(kinds) == 1 else [])]))


def markdown(records: list[dict]) -> str:
    """A row for each record and kind of update: counted beside planned, in all and the worst of the terms."""
    rows = ["| setting | update | counted, GB | plan | error | largest error of a term above 1 GB | FLOPs, error |"]
    rows += ["|---" * 7 + "|"]
    for record in records:
        said, s = planned(record), record["settings"]
        what = [record["size"], f"LoRA {record['lora']}" if record["lora"] else "", s["checkpointing"]]
        what += chosen(record)
        where = f"{', '.join(filter(None, what))}; {s['gpus']} GPU{'s' * (s['gpus'] > 1)}"
        for kind, found in record["counted"].items():
            a, b = found["memory"], said[kind]["memory"]
            all_of = lambda terms: sum(terms.values())
            big = [term for term in TERMS if max(a[term], b[term]) > GB]
            worst = max(big, key=lambda term: abs(b[term] / a[term] - 1) if a[term] else 1)
            apart = f"{worst}: {a[worst] / GB:.1f}, plan {b[worst] / GB:.1f} ({error(a[worst], b[worst])})"
            flops = error(all_of(found["flops"]), all_of(said[kind]["flops"]))
            total = f"{all_of(a) / GB:.1f} | {all_of(b) / GB:.1f} | {error(all_of(a), all_of(b))}"
            rows.append(f"| {where} | {NAMES[kind]} | {total} | {apart} | {flops} |")
    return "\n".join(rows) + "\n"


def chosen(record: dict) -> list[str]:
    """In words what is not as usual."""
    given = [f"{key.replace('_', ' ')} {value}" for key, value in record["given"].items()]
    return given + ([] if whole(record) else [f"ONLY {record['layers']} blocks"])


def sampled(record: dict) -> list[tuple]:
    """Rows (part, bytes of weights, of activations, FLOPs), the last for all that `sample` has on one GPU."""
    parts = record["sampling"]
    of = lambda found: (found["memory"]["weights"], found["memory"]["activations"], sum(found["flops"].values()))
    rows = [(name.replace("vae", "VAE"), *of(found)) for name, found in parts.items()]
    taken = [row for row in rows if "tiles" not in row[0]]
    _, held, at_work, flops = zip(*taken)
    return [*rows, ("together", sum(held), max(at_work), sum(flops))]


def sampling_markdown(records: list[dict]) -> str:
    """A row for each part of sampling; what was counted for another number of GPUs as well is there once."""
    rows = ["| clip | part | weights, GB | activations, GB | in all | plan | error | TFLOP | plan, error |"]
    rows += ["|---" * 9 + "|"]
    for record in (record for record in records if "sampling" in record):
        s, said = record["settings"], planned_sampling(record)
        clip = f"{s['frames']} frames of {s['height']}x{s['width']}, M = {s['M']}, N = {s['N']}"
        where = "; ".join([record["size"], *chosen(record), clip])
        for name, held, at_work, flops in sampled(record):
            plan_gb, apart, apart_flops = "", "", ""
            if name == "student":
                total = sum(said["memory"].values())
                plan_gb, apart = f"{total / GB:.1f}", error(held + at_work, total)
                apart_flops = error(flops, said["flops"])
            counted = f"{held / GB:.2f} | {at_work / GB:.2f} | {(held + at_work) / GB:.1f}"
            rows.append(f"| {where} | {name} | {counted} | {plan_gb} | {apart} | {flops / 1e12:.1f} | {apart_flops} |")
    return "\n".join(dict.fromkeys(rows)) + "\n"


def error(counted: float, said: float) -> str:
    return f"{said / counted - 1:+.1%}" if counted else ("" if not said else "not there")


def text(record: dict) -> str:
    """Counted beside planned, for every kind of update: memory by term and FLOPs by sort."""
    s, said = record["settings"], planned(record)
    where = f"{s['gpus']} GPU{'s' * (s['gpus'] > 1)}" + f", LoRA of rank {s['lora']}" * bool(s["lora"])
    depth = f"{'all' if whole(record) else 'ONLY'} {record['layers']} blocks"
    lines = [
        f"Rehearsal of {record['size']}, {depth}, on {where}: counted on tensors without memory, not measured.",
        f"{s['frames']} frames of {s['height']}x{s['width']}"
        + (f"; activation checkpointing: {s['checkpointing']}." if record["counted"] else "."),
        f"torch {record['torch']}, {record['date']}",
    ]
    row = lambda name, a, b: f"  {name:<20}{a:>12,.2f}{b:>12,.2f}{error(a, b):>10}"
    for kind, found in record["counted"].items():
        guess = said[kind]
        lines += ["", f"{NAMES[kind] + ', GB':<22}{'counted':>12}{'plan':>12}{'error':>10}"]
        lines += [row(term, found["memory"][term] / GB, guess["memory"][term] / GB) for term in TERMS]
        lines += [row("total", sum(found["memory"].values()) / GB, sum(guess["memory"].values()) / GB)]
        lines += [f"{'TFLOP of a micro-batch':<22}"]
        flops = {sort: found["flops"].get(sort, 0) for sort in SORTS}
        lines += [row(sort, flops[sort] / 1e12, guess["flops"][sort] / 1e12) for sort in SORTS if flops[sort]]
        lines += [row("total", sum(flops.values()) / 1e12, sum(guess["flops"].values()) / 1e12)]
        lines += [f"  counted in {found['seconds']:g} s"]
    if "sampling" in record:
        lines += sampling_text(record)
    return "\n".join([*lines, "", NOT_COVERED])


def sampling_text(record: dict) -> list[str]:
    """Lines: what the parts of a sample hold and compute, the plan's student beside."""
    s, said = record["settings"], planned_sampling(record)
    row = lambda name, *numbers: f"  {name:<20}" + "".join(f"{number:>12,.2f}" for number in numbers)
    parts, tera = record["sampling"], 1e12
    lines = ["", f"{'a clip on one GPU':<22}{'weights, GB':>12}{'activations':>12}{'total':>12}{'TFLOP':>12}"]
    for name, held, at_work, flops in sampled(record):
        lines += [row(name, held / GB, at_work / GB, (held + at_work) / GB, flops / tera)]
        if name == "student":
            a, b = said["memory"].values()
            apart = f"   {error(held + at_work, a + b)} and {error(flops, said['flops'])}"
            lines += [row("  by plan", a / GB, b / GB, (a + b) / GB, said["flops"] / tera) + apart]
    seconds = sum(found["seconds"] for found in parts.values())
    return [*lines, f"  M = {s['M']}, N = {s['N']}, in bf16, the VAE in float32; counted in {seconds:.1f} s"]
