"""`bench`: what a forward, a training step and a sample cost on this GPU, at full size with random weights.

The first two cases settle whether it runs, how fast a forward is and whether training fits. Then the most valuable
come first, every result is written as it comes, and no case starts after --bench-minutes: a run
that is cut short has measured something. Seconds are medians after a warm-up, on a GPU by CUDA events. A case that
fails says why, and the next one starts. cost/benchmarks.py sets the numbers beside the plan's.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path

import torch

import tmd_minimal as tmd
from wan_scale import rates, speed
from wan_scale.config import Wan, preset
from wan_scale.cost.benchmarks import RESULTS
from wan_scale.cost.memory import RESERVE, choose_checkpointing, memory
from wan_scale.cost.sizes import GB, WAN, discriminator, known, latent, tokens
from wan_scale.cost.work import FP32_SLOWDOWN, measured_rates, rates_of, step_work, time_of
from wan_scale.data.files import write_json
from wan_scale.model import WanDiscriminator, WanNetwork, feature_channels
from wan_scale.training import dist, lora, train, weights
from wan_scale.training.phase import Feed, WanPhase

LOOKED_AT = (  # by what is measured: a setting of these that is not the preset's makes a variant, named in this order
    "frames height width N H micro_batch taps disc_width lora device precision tf32 checkpointing attn compile "
    "card_gb bench_minutes"
).split()
FIRST = "forward, stock call"
GRIDS = (1, 2), (1, 1), (1, 4), (2, 2), (4, 1)  # (M, N), by value


class Bench:
    """One machine, one size: cases to run."""

    def __init__(self, cfg: Wan, config: dict, repeats: int = 5):
        self.cfg, self.config, self.repeats, self.begun, self.record = cfg, config, repeats, time.perf_counter(), {}
        self.device = dist.start(cfg.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = train.compute_dtype(cfg, self.device)
        self.shape = (config["in_channels"], *latent(cfg.frames, cfg.height, cfg.width))
        self.tokens, self.D = tokens(config, cfg.frames, cfg.height, cfg.width), known(config)["D"]
        cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
        self.hardware = torch.cuda.get_device_name() if self.cuda else cpu
        attn = "native" if cfg.attn == "auto" else cfg.attn  # until the case "attention" has chosen
        self.attn = self.attn_forward = attn
        self.compiled = cfg.compile == "on" or (cfg.compile == "auto" and self.cuda)
        budget = (torch.cuda.get_device_properties(0).total_memory if self.cuda else cfg.card_gb * GB) * (1 - RESERVE)
        self.disc = disc = discriminator(config, self.shape[1:], cfg.disc_width, len(cfg.tap_blocks))
        held = dict(H=cfg.H, N=cfg.N, micro_batch=cfg.micro_batch, disc=disc["parameters"],
                    disc_bytes=disc["features"], disc_live=disc["live"], accumulated=False,
                    compiled=self.compiled)  # fmt: skip
        smallest = max(sum(memory(config, self.tokens, kind, **held).values()) for kind in ("student", "critic"))
        self.lora = cfg.lora or 64 * (smallest > budget)  # what one GPU cannot train in full is measured with LoRA
        chosen = choose_checkpointing(config, self.tokens, budget, lora=self.lora, **held)
        self.mode = chosen if cfg.checkpointing == "auto" else cfg.checkpointing
        speed.tf32(cfg.tf32)

    # ---- Clock and networks ----

    def left(self) -> float:
        """Seconds of --bench-minutes that are left."""
        return self.begun + 60 * self.cfg.bench_minutes - time.perf_counter()

    def expected(self, kind: str, attn: str, tf32: bool = False, **how) -> float:
        """Seconds of such a step by `plan` and the rates measured here, or its first forward; 0 as long as none is."""
        try:
            rate = measured_rates(self.record, tf32, attn)
        except (ValueError, KeyError):
            forward = self.record.get("cases", {}).get(FIRST, {}).get("seconds")
            if not forward:
                return 0.0
            teacher = step_work(self.config, self.tokens, "teacher", H=self.cfg.H)["teacher"]
            rate = rates_of(time_of(teacher, rates_of(1.0, 1.0)) / forward, FP32_SLOWDOWN, tf32)
        how = dict(N=self.cfg.N, last_tap=self.cfg.tap_blocks[-1], disc_flops=self.disc["flops"], H=self.cfg.H,
                   disc_checkpointing=True) | how  # fmt: skip
        return sum(time_of(work, rate) for work in step_work(self.config, self.tokens, kind, **how).values())

    def affordable(self, seconds: float = 0) -> None:
        """RuntimeError where that is more than what is left."""
        if seconds > self.left():
            by_plan = f"{seconds:.0f} s by plan, " if seconds else ""
            raise RuntimeError(f"left out: {by_plan}{max(self.left(), 0):.0f} s were left")

    def median(self, work, warm: int = 2, within: float = 15.0) -> dict:
        """Median seconds of work() after a warm-up, of how many, and the peak memory in GB."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds, n = speed.median_seconds(work, self.device, self.repeats, warm, within)
        return {"seconds": seconds, "n": n, **self.peak()}

    def peak(self) -> dict:
        return {"peak_gb": torch.cuda.max_memory_allocated() / GB} if self.cuda else {}

    def network(self, dtype: torch.dtype, but: str | None = None) -> WanNetwork:
        """The stock transformer, random weights drawn on its device in their dtypes; `but`: names that get none yet."""
        torch.manual_seed(0)
        return WanNetwork(weights.draw(weights.empty(self.config, dtype, self.device), self.device, but))

    def frozen(self) -> WanNetwork:
        return self.network(self.dtype).requires_grad_(False)

    def student(self, base: WanNetwork | None) -> tmd.TMDStudent:
        """Only what is its own gets memory: with a shared `base` neither the blocks of the base nor a copy of them."""
        net = self.network(torch.float32, but="blocks.")
        student = tmd.TMDStudent(lora.graft(net, base, self.cfg.H) if base else net, self.cfg.H)
        return weights.draw(student, self.device).to(self.device)

    def batch(self, n: int = 1):
        g = torch.Generator().manual_seed(0)
        make = lambda *shape: torch.randn(shape, generator=g).to(self.device)
        return make(n, *self.shape), make(n, 512, self.config["text_dim"])

    # ---- Cases: each returns seconds (a number, or by part) and facts ----

    def attention(self) -> dict:
        """Self-attention by backend. Forwards and samples then take the fastest forward, training the fastest both."""
        heads, head_dim = self.config["num_attention_heads"], self.config["attention_head_dim"]
        times = partial(speed.attention_times, heads, head_dim, self.tokens, self.device, self.dtype)
        forward, both = (times(backward=backward, compiled=self.compiled) for backward in (False, True))
        if self.cfg.attn == "auto" and self.cuda:
            self.attn, self.attn_forward = speed.fastest(both), speed.fastest(forward)
        found = {**forward, **{f"{name}, with backward": s for name, s in both.items()}}
        ran = {name: s for name, s in found.items() if not isinstance(s, str)}
        reasons = {name: s for name, s in found.items() if name not in ran}
        return {"seconds": ran, "reasons": reasons, "attn": self.attn, "attn_forward": self.attn_forward}

    def forward(self, compiled: bool = False, stock: bool = False) -> dict:
        """One teacher forward without gradient; stock: as diffusers is called, with its own attention."""
        net, (x, c), t = self.frozen(), self.batch(), torch.full((1,), 0.7, device=self.device)
        attn = "native" if stock else self.attn_forward
        half = x.to(self.dtype), 1000 * t, c.to(self.dtype)
        work = (lambda: net.transformer(*half, return_dict=False)) if stock else (lambda: net(x, t, c))
        if not stock:
            speed.prepare(net, attn, compiled)
        with torch.no_grad(), nullcontext() if stock else train.compute(self.cfg, self.device):
            return self.median(work) | {"attn": attn, "compiled": compiled}

    def sampling(self, graphed: bool = False, grids=None) -> dict:
        """The transformer's part of a sample at every (M, N), the prompt known; graphed: the head as a CUDA graph."""
        student = tmd.TMDStudent(self.frozen(), self.cfg.H).to(self.device).requires_grad_(False)
        speed.prepare(student.net, self.attn_forward, self.compiled, frozen=True)
        if graphed:
            student = speed.GraphedHead(student)
        (x, c), found, reasons = self.batch(), {}, {}
        for M, N in grids or GRIDS:
            part, how = f"M{M}N{N}", replace(self.cfg, M=M, N=N).how()
            try:
                self.affordable(4 * self.expected("sample", self.attn_forward, M=M, N=N, compiled=self.compiled))
                with torch.no_grad(), train.compute(self.cfg, self.device):
                    work = partial(train.draw, student, how, x, c, seed=0)
                    found[part] = self.median(work, warm=1 + (not found), within=8.0)
            except RuntimeError as e:  # what was measured stays; out of memory is one of these
                reasons[part] = reason(e)
        if graphed and found and not student.recorded:
            raise RuntimeError("the head could not be recorded")
        if not found:
            raise RuntimeError("; ".join(f"{part}: {why}" for part, why in reasons.items()))
        of = lambda key: {name: value[key] for name, value in found.items() if key in value}
        facts = {"attn": self.attn_forward, "compiled": self.compiled, "reasons": reasons}
        return {"seconds": of("seconds"), "n": of("n"), "peak_gb": of("peak_gb")} | facts

    def vae(self) -> dict:
        """Decoding one clip with Wan's VAE of random weights."""
        from diffusers import AutoencoderKLWan

        small = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} if self.config["num_layers"] < 10 else {}
        with self.device:
            vae = AutoencoderKLWan(**small).eval()
        z = torch.randn(1, 16, *self.shape[1:], device=self.device)
        with torch.no_grad():
            return self.median(lambda: vae.decode(z, return_dict=False), warm=1)

    def training(self, kind: str, naive: bool = False, mode: str | None = None, difference: bool = True,
                 compiled: bool | None = None, tf32: bool | None = None) -> dict:  # fmt: skip
        """Seconds of an update with one micro-batch, by the real loop: "stage 1", or "stage 2" (student and critics).

        naive: native attention, blocks not compiled, full activation checkpointing, torch's default AdamW. difference:
        stage 1's finite difference is needed in every micro-batch, or in none. mode: activation checkpointing.
        """
        mode = "full" if naive else mode or self.mode
        tf32, compiled = self.cfg.tf32 if tf32 is None else tf32, self.compiled if compiled is None else compiled
        speed.tf32(tf32)
        facts = {"attn": "native" if naive else self.attn, "compiled": compiled and not naive, "checkpointing": mode}
        like = dict(**facts, tf32=tf32, lora=self.lora, flow_map_share=float(difference))
        step = lambda kind: self.cfg.micro_batch * self.expected(kind, **like)
        of_each = {"stage 1": step("stage1"), "stage 2": step("student") + step("critic")}[kind]
        rounds = 4 if 4 * of_each < self.left() / 2 else 2  # the first of each is the warm-up
        if naive and rounds * of_each > self.left():
            rounds = 1  # nothing is compiled: a first update is better than none
        self.affordable(rounds * of_each)
        (x, c), cfg, how = self.batch(self.cfg.micro_batch), self.cfg, self.cfg.how()
        data, c_neg, L = (lambda n, g: (x, c)), torch.zeros_like(c[0]), self.config["num_layers"]
        base = self.network(self.dtype) if self.lora else None
        if base:
            depth = {"student": L - cfg.H} | ({"fake": L} if kind == "stage 2" else {})
            lora.adapt(base, self.lora, cfg.lora_scale, depth).to(self.device)
        student = self.student(base)
        speed.prepare(student, **facts)
        seconds, peaks, last = {}, {}, [speed.moment(self.device)]

        def on_step(phase, terms):
            part, end = "student" if "vsd" in terms else "critic", speed.moment(self.device)
            part = part if kind == "stage 2" else ""
            seconds.setdefault(part, []).append(speed.between(last[0], end))
            peaks.setdefault(part, []).append(self.peak().get("peak_gb"))
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            last[0] = speed.moment(self.device)

        def make(*args, **kw):
            phase = WanPhase(*args, feed=Feed(None), ema_on="cpu" if self.lora else None, **kw)
            for optimizer in phase.optimizers.values() if naive else ():
                for group in optimizer.param_groups:
                    group["fused"] = None  # torch's default: many tensors at a time on a GPU
            return phase

        shared = {"c_neg": c_neg, "make": make, "on_step": on_step, "progress": False}
        with train.compute(cfg, self.device):
            if kind == "stage 1":
                one = replace(cfg.stage1(), updates=rounds, flow_map_share=float(difference))
                tmd.train_stage1(student, data, how, one, **shared)
            else:
                roles = (lora.Role(base), lora.Role(base, "fake")) if base else ()
                teacher, fake = roles or (self.frozen(), self.network(torch.float32))
                speed.prepare(teacher, **facts), speed.prepare(fake, **facts)
                size = feature_channels(teacher), cfg.disc_width, len(cfg.tap_blocks)
                disc = WanDiscriminator(*size, checkpointing=True).to(self.device)
                two = replace(cfg.stage2(), iterations=2 * rounds, student_every=2)
                tmd.train_stage2(student, teacher, disc, data, how, two, taps=cfg.tap_blocks, fake_score=fake, **shared)
        found = {
            "seconds": {part: statistics.median(s[1:] or s) for part, s in seconds.items()},
            "n": rounds - 1,  # 0: the first update, before anything was warm
        }
        if self.cuda:
            found["peak_gb"] = {part: max(gb[1:] or gb) for part, gb in peaks.items()}
        return found | facts | {"lora": self.lora, "difference": difference, "tf32": tf32}

    def cases(self) -> dict:
        """Name: (work, whether only a GPU can), in order of value."""
        stage1, stage2 = partial(self.training, "stage 1"), partial(self.training, "stage 2")
        full = {"stage 2, full checkpointing": (partial(stage2, mode="full"), False)} if self.mode != "full" else {}
        few = GRIDS[:3] if self.lora else GRIDS  # 14B: the bars first, the rest in "sampling"
        return {
            FIRST: (partial(self.forward, stock=True), False),
            "stage 2, naive": (partial(stage2, naive=True), False),
            "attention": (self.attention, False),
            "rates": (partial(rates.measure, self), False),
            "forward, compiled": (partial(self.forward, compiled=True), self.cfg.compile != "on"),
            "sampling, graphed head": (partial(self.sampling, graphed=True, grids=few), True),
            "stage 2": (stage2, False),
            **full,  # in the naive baseline's memory
            "stage 1": (stage1, False),
            "stage 1, no finite difference": (partial(stage1, difference=False), False),
            "sampling": (self.sampling, False),
            "forward": (self.forward, False),
            "VAE decode": (self.vae, False),
            "stage 1, TF32": (partial(stage1, tf32=True), True),
            "stage 2, not compiled": (partial(stage2, compiled=False), True),
        }


def reason(e: Exception) -> str:
    """Why a case failed, in a line."""
    words = (str(e).splitlines() or [type(e).__name__])[0][:200]
    return "out of memory" if isinstance(e, torch.OutOfMemoryError) else words


def run(cfg: Wan, config: dict, name: str, out: Path | None = None, repeats: int = 5) -> dict:
    """Every case of a size on this machine; OUT/<name>-<GPU>-<date>.json grows as they come. Returns the record."""
    bench = Bench(cfg, config, repeats)
    record = {"size": name, "card": bench.hardware, "date": date.today().isoformat(), "torch": torch.__version__}
    usual, ours = asdict(preset(name)), asdict(cfg)
    given = {key.replace("_", "-"): ours[key] for key in LOOKED_AT if ours[key] != usual[key]}
    given = [key if value is True else f"{key} {value}" for key, value in given.items()]
    record["command"] = " --".join([f"python wan_scale/run.py bench --preset {name}", *given])
    record |= {"precision": str(bench.dtype).removeprefix("torch."), "tf32": cfg.tf32, "micro_batch": cfg.micro_batch}
    record |= {"tokens": bench.tokens, "clip": [cfg.frames, cfg.height, cfg.width]}
    record |= {"H": cfg.H, "N": cfg.N, "last_tap": cfg.tap_blocks[-1]}
    record["discriminator"] = discriminator(config, bench.shape[1:], cfg.disc_width, len(cfg.tap_blocks))
    record |= {"config": {key: config[key] for key in WAN["1.3b"]}, "cases": {}}
    bench.record = record
    variant = record["variant"] = [words for words in given if not words.startswith("bench-minutes")]
    plain = lambda text: "".join(ch if ch.isalnum() else "-" for ch in text).strip("-").lower()
    path = (out or RESULTS) / f"{'-'.join([name, plain(bench.hardware), record['date'], *map(plain, variant)])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for case, (work, needs_gpu) in bench.cases().items():
        start = time.perf_counter()
        try:
            if needs_gpu and not bench.cuda:
                raise RuntimeError("needs a GPU")
            bench.affordable()
            found = work()
        except Exception as e:  # whatever a GPU or a build lacks must not end the run
            found = {"failed": reason(e)}
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
        record["cases"][case] = {**found, "measured_in": time.perf_counter() - start}
        record["attn"] = bench.attn
        write_json(path, record)
        dist.say(f"{case}: {json.dumps({k: v for k, v in found.items() if k not in ('measured_in', 'work')})}")
    return record
