"""`bench`: what a forward, a training step and a sample cost on this card, at full size with random weights, beside the plan.

The order is by value, and every line is written as it comes, so that a run that is cut short has measured something. Seconds are medians
after a warm-up; a case that runs out of memory says so and the next one starts.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import torch

import tmd_minimal as tmd
from wan_scale import dist, plan, train
from wan_scale.config import Wan
from wan_scale.data import write_json
from wan_scale.model import WanDiscriminator, WanNetwork, feature_channels
from wan_scale.phase import Feed, WanPhase

RESULTS = Path(__file__).parent / "bench_results"
GRIDS = (1, 1), (1, 2), (1, 4), (2, 2), (4, 1)  # (M, N)
BACKENDS = ("native", "_native_cudnn", "_native_flash")


class Bench:
    """One machine, one size: cases to run and the record they go to."""

    def __init__(self, cfg: Wan, config: dict, repeats: int = 5):
        self.cfg, self.config, self.repeats = cfg, config, repeats
        self.device = dist.start(cfg.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = train.compute_dtype(cfg, self.device)
        frames, height, width = plan.latent(cfg.frames, cfg.height, cfg.width)
        self.shape = (config["in_channels"], frames, height, width)
        self.tokens = plan.tokens(config, cfg.frames, cfg.height, cfg.width)
        self.card = torch.cuda.get_device_name() if self.cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"

    def median(self, work, **facts) -> dict:
        """Median seconds of work() after two warm-ups, and the peak memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(2 + self.repeats):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return {"seconds": statistics.median(seconds[2:]), **self.peak(), **facts}

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self) -> dict:
        return {"peak_gb": torch.cuda.max_memory_allocated() / 2**30} if self.cuda else {}

    def transformer(self, dtype: torch.dtype):
        """The stock transformer with random weights, made where it will live; in bf16 what diffusers keeps in float32 is float32."""
        from diffusers import WanTransformer3DModel

        torch.manual_seed(0)
        with self.device:
            net = WanTransformer3DModel(**self.config)
        for name, p in net.named_parameters():
            if not any(part in WanTransformer3DModel._keep_in_fp32_modules for part in name.split(".")):
                p.data = p.data.to(dtype)
        return net

    def batch(self, n: int = 1):
        g = torch.Generator().manual_seed(0)
        make = lambda *shape: torch.randn(shape, generator=g).to(self.device)
        return make(n, *self.shape), make(n, 512, self.config["text_dim"])

    # ---- Cases ----

    def matmul(self) -> dict:
        """The card's own rate on the model's widest matmul: what all shares below are of."""
        n, d, ffn = self.tokens, self.config["num_attention_heads"] * self.config["attention_head_dim"], self.config["ffn_dim"]
        a, b = torch.randn(n, d, device=self.device, dtype=self.dtype), torch.randn(d, ffn, device=self.device, dtype=self.dtype)
        found = self.median(lambda: a @ b)
        return found | {"tflops": 2 * n * d * ffn / found["seconds"] / 1e12}

    def forward(self, backend: str = "native", compiled: bool = False) -> dict:
        """One teacher forward without gradient."""
        net = self.transformer(self.dtype).requires_grad_(False)
        if backend != "native":
            net.set_attention_backend(backend)
        if compiled:
            net.compile_repeated_blocks()
        teacher, (x, c), t = WanNetwork(net), self.batch(), torch.full((1,), 0.7, device=self.device)
        with torch.no_grad(), train.compute(self.cfg, self.device):
            found = self.median(lambda: teacher(x, t, c))
        return found | {"tflops": plan.flops(self.config, self.tokens, H=self.cfg.H)["whole"]["total"] / found["seconds"] / 1e12}

    def sampling(self, naive: bool = False) -> dict:
        """DiT part of a sample at every (M, N); naive: a stock diffusers call for every evaluation, as many whole ones as M N."""
        net = self.transformer(self.dtype).requires_grad_(False)
        x, c = self.batch()
        found = {}
        if not naive:
            student = tmd.TMDStudent(WanNetwork(net), self.cfg.H).requires_grad_(False)
        for M, N in GRIDS:
            how = replace(self.cfg, M=M, N=N).how()
            with torch.no_grad(), train.compute(self.cfg, self.device):
                if naive:
                    t = torch.full((1,), 700.0, device=self.device)
                    half, text = x.to(self.dtype), c.to(self.dtype)
                    once = lambda half=half, text=text, t=t: net(half, t, text, return_dict=False)
                    work = lambda M=M, N=N, once=once: [once() for _ in range(M * N)]
                else:
                    work = partial(train.draw, student, how, x, c, seed=0)
                found[f"M{M}N{N}"] = self.median(work)["seconds"]
        return {"seconds": found, **self.peak()}

    def vae(self) -> dict:
        """Decoding one clip with Wan's VAE of random weights."""
        from diffusers import AutoencoderKLWan

        with self.device:
            vae = AutoencoderKLWan(**({"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} if self.small else {})).eval()
        z = torch.randn(1, 16, *self.shape[1:], device=self.device)
        with torch.no_grad():
            return self.median(lambda: vae.decode(z, return_dict=False))

    @property
    def small(self) -> bool:
        return self.config["num_layers"] < 10

    def training(self, kind: str) -> dict:
        """Seconds of an update with one micro-batch, by the real loop: stage 1, or stage 2's student and critics."""
        x, c = self.batch(self.cfg.micro_batch)
        data, c_neg, how = (lambda n, g: (x, c)), torch.zeros_like(c[0]), self.cfg.how()
        seconds, before = {"student": [], "critic": [], "stage1": []}, [0.0]
        student = tmd.TMDStudent(WanNetwork(self.transformer(torch.float32), self.cfg.checkpointing), self.cfg.H).to(self.device)

        def on_step(phase, terms):
            spent, before[0] = phase.seconds - before[0], phase.seconds
            seconds["stage1" if kind == "stage1" else "student" if "vsd" in terms else "critic"].append(spent)

        make = partial(WanPhase, feed=Feed(None))
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        with train.compute(self.cfg, self.device):
            if kind == "stage1":
                one = replace(self.cfg.stage1(), updates=2 + self.repeats)
                tmd.train_stage1(student, data, how, one, c_neg=c_neg, make=make, on_step=on_step, progress=False)
                return {"seconds": statistics.median(seconds["stage1"][2:]), **self.peak()}
            teacher = WanNetwork(self.transformer(self.dtype).requires_grad_(False))
            fake = WanNetwork(self.transformer(torch.float32), self.cfg.checkpointing)
            disc = WanDiscriminator(
                feature_channels(teacher), self.cfg.disc_width, len(self.cfg.tap_blocks), checkpointing=self.cfg.checkpointing
            )
            two = replace(self.cfg.stage2(), iterations=15)
            tmd.train_stage2(student, teacher, disc.to(self.device), data, how, two, taps=self.cfg.tap_blocks, c_neg=c_neg, fake_score=fake,
                             make=make, on_step=on_step, progress=False)  # fmt: skip
        return {"seconds": {k: statistics.median(v[1:]) for k, v in seconds.items() if v}, **self.peak()}

    def cases(self) -> dict:
        """Name: work, in order of value."""
        more = {}
        if self.cuda:
            more = {f"forward, attention {b}": partial(self.forward, b) for b in BACKENDS[1:]}
            more["forward, blocks compiled"] = partial(self.forward, compiled=True)
        found = {"matmul": self.matmul, "forward": self.forward, "stage 2": partial(self.training, "stage2")}
        found |= {"stage 1": partial(self.training, "stage1"), "sampling": self.sampling, **more}
        return found | {"sampling, stock calls": partial(self.sampling, naive=True), "VAE decode": self.vae}


def run(cfg: Wan, config: dict, name: str, out: Path | None = None, repeats: int = 5) -> dict:
    """Every case of a size on this machine; OUT/<name>-<card>-<date>.json grows as they come. Returns the record."""
    bench = Bench(cfg, config, repeats)
    record = {
        "size": name,
        "card": bench.card,
        "date": date.today().isoformat(),
        "command": f"python wan_scale/run.py bench --preset {name}",
    }
    record |= {"torch": torch.__version__, "precision": str(bench.dtype).removeprefix("torch."), "tokens": bench.tokens}
    record |= {"config": {key: config[key] for key in plan.WAN["1.3b"]}, "H": cfg.H, "N": cfg.N, "cases": {}}
    label = "".join(ch if ch.isalnum() else "-" for ch in bench.card).strip("-").lower()
    path = (out or RESULTS) / f"{name}-{label}-{record['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for case, work in bench.cases().items():
        start = time.perf_counter()
        try:
            found = work()
        except torch.OutOfMemoryError:
            found = {"failed": "out of memory"}
        except (RuntimeError, ValueError, ImportError) as e:  # a backend that this card or build lacks must not end the run
            found = {"failed": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
        record["cases"][case] = {**found, "measured_in": time.perf_counter() - start}
        write_json(path, record)
        dist.say(f"{case}: {json.dumps({k: v for k, v in found.items() if k != 'measured_in'})}")
    return record


def markdown(records: list[dict]) -> str:
    """Tables of records: seconds, memory, share of the card's matmul rate, and what the plan says."""
    if not records:
        return "Not measured yet: no card was at hand. `make bench-gpu` measures and writes this file.\n"
    text = []
    for r in records:
        rate = r["cases"]["matmul"].get("tflops")
        text += [
            f"**{r['size']}**, {r['tokens']:,} tokens, {r['card']}, {r['date']}, torch {r['torch']}, {r['precision']}; `{r['command']}`",
            "",
        ]
        text += ["| case | seconds | plan, at the matmul rate | peak GB | of the matmul rate |", "|---|---|---|---|---|"]
        for case, found in r["cases"].items():
            if "failed" in found:
                text.append(f"| {case} | {found['failed']} | | | |")
                continue
            seconds = found["seconds"] if isinstance(found["seconds"], dict) else {"": found["seconds"]}
            for part, s in seconds.items():
                share = f"{found['tflops'] / rate:.0%}" if "tflops" in found and rate else ""
                guess = planned(r, case, part, rate)
                peak = f"{found['peak_gb']:.1f}" if "peak_gb" in found else ""
                text.append(f"| {case} {part} | {s:.4g} | {'' if guess is None else f'{guess:.4g}'} | {peak} | {share} |")
        text.append("")
    return "\n".join(text)


def planned(record: dict, case: str, part: str, rate: float | None) -> float | None:
    """The plan's seconds of a case at the measured matmul rate, or None where it has none."""
    config, n, H = record["config"], record["tokens"], record["H"]
    kinds = {("stage 1", ""): "stage1", ("stage 2", "student"): "student", ("stage 2", "critic"): "critic"}
    if not rate:
        return None
    if case.startswith("forward"):
        flops = plan.flops(config, n, H=H)["whole"]["total"]
    elif case == "sampling" and part:
        M, N = (int(v) for v in part[1:].split("N"))
        flops = sum(plan.step_flops(config, n, "sample", M=M, N=N, H=H).values())
    elif (case, part) in kinds:
        flops = sum(plan.step_flops(config, n, kinds[case, part], N=record["N"], H=H).values())
    else:
        return None
    return flops / (rate * 1e12)
