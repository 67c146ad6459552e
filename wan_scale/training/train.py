"""Stage 1, stage 2 and the baseline on Wan: tmd_minimal's training loops, with Wan's networks, many GPUs and a log.

Each function trains one phase, goes on from its newest checkpoint, and leaves what students.py says. A finished phase
is not run again.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

import tmd_minimal as tmd
from wan_scale import speed
from wan_scale.config import Wan, WanStudentConfig
from wan_scale.cost.plan import plan
from wan_scale.data.ahead import Ahead
from wan_scale.data.folders import check_folder
from wan_scale.data.lock import only_one
from wan_scale.data.reader import Reader
from wan_scale.model import WanDiscriminator, WanNetwork, feature_channels, load_transformer
from wan_scale.preflight import check_taps
from wan_scale.seeds import mixed
from wan_scale.training import dist, logs, lora, previews, ulysses, watch, weights
from wan_scale.training.phase import Feed, WanPhase
from wan_scale.training.students import (
    check_weights,
    describe,
    describe_finished,
    finished,
    load_student,
    save_student,
    start_of,
    transformer_of,
)


def compute_dtype(cfg: Wan, device: torch.device) -> torch.dtype:
    half = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def compute(cfg: Wan, device: torch.device):
    """Context of all network calls.

    No cache of casts: within one context weights move, and a cached cast would be the first step's.
    """
    dtype = compute_dtype(cfg, device)
    return torch.autocast(device.type, dtype, cache_enabled=False) if dtype != torch.float32 else nullcontext()


def network(cfg: Wan, dtype=torch.float32) -> WanNetwork:
    """The folder's transformer, its blocks without weights yet.

    weights.fill reads them once each rank's part has its place.
    """
    check_folder(cfg.model, parts=("transformer",))
    net = WanNetwork(weights.skeleton(cfg.model, dtype))
    net.stored = weights.files(Path(cfg.model) / "transformer", "transformer.")
    check_taps(cfg, len(net.blocks))
    return ulysses.share(net, cfg.context_parallel)


def shared_base(cfg: Wan, how: WanStudentConfig, device: torch.device, fake: bool = False) -> WanNetwork | None:
    """With --lora: the one frozen transformer under all roles, on the device, with the adapters; else None."""
    if not cfg.lora:
        return None
    tmd.seed_everything(cfg.seed)
    base = weights.fill(network(cfg, compute_dtype(cfg, device)), device).to(device)
    layers = len(base.blocks)
    return lora.adapt(base, cfg.lora, cfg.lora_scale, {"student": layers - how.H} | ({"fake": layers} if fake else {}))


def make_student(cfg: Wan, how: WanStudentConfig, start: str | None = None, base: WanNetwork | None = None):
    """TMDStudent (PlainStudent where H is 0), alike on every rank.

    weights.fill gives it the teacher's weights or those of phase `start`. With a shared `base` its first L-H blocks are
    that one's.
    """
    tmd.seed_everything(cfg.seed)
    net = network(cfg) if base is None else lora.graft(network(cfg), base, how.H)
    student = tmd.TMDStudent(net, how.H, how.fusion) if how.H else tmd.PlainStudent(net)
    student.stored = {f"net.{name}": where for name, where in net.stored.items()}
    if start:
        if finished(cfg.folder(start), cfg, told=False):  # of these settings
            check_weights(cfg.folder(start))
        load_student(cfg.folder(start), student)
    return student


def accumulation(cfg: Wan) -> int:
    """Micro-batches of a rank for one update; ValueError if the global batch or the ranks do not divide."""
    dist.context_group(cfg.context_parallel)
    per_step = cfg.micro_batch * dist.world() // cfg.context_parallel
    if cfg.global_batch % per_step:
        gpus = f"{dist.world()} GPUs" + f", {cfg.context_parallel} to a clip" * (cfg.context_parallel > 1)
        by = f"micro_batch {cfg.micro_batch} x {gpus}"
        raise ValueError(f"global_batch {cfg.global_batch} does not divide by {by}; change one.")
    return cfg.global_batch // per_step


class Training:
    """What the phases share: device, data, micro-batches, log, previews. start: the phase whose student it takes."""

    def __init__(self, cfg: Wan, name: str, shards: Path, start: str | None = None):
        self.cfg, self.name, self.folder = cfg, name, cfg.folder(name)
        self.device = dist.start(cfg.device, alone=cfg.offload_teacher)  # FSDP fetches an offloaded net, in a group
        speed.tf32(cfg.tf32)
        size = sum(file.stat().st_size for file in Path(shards).glob("shard-*.safetensors"))
        verify = cfg.verify or size < 50e9  # every rank reads a shard whole to check it: hours for terabytes
        order = mixed(cfg.seed, name in ("stage2", "dmd2v"))  # stage 2 meets the clips in another order than stage 1
        clip = (cfg.frames, cfg.height, cfg.width)
        self.reader = Reader(shards, seed=order, device=self.device, verify=verify, size=clip)
        self.c_neg = self.reader.negative
        if not bool(torch.isfinite(self.c_neg).all()):
            raise ValueError(f"the negative prompt's embedding in {shards} is not finite; make the data again.")
        self.accumulate = accumulation(cfg)
        # what it is trained from, beside the settings; the phase `teacher` is to change the teacher
        self.origin = {} if name == "teacher" else {"transformer": transformer_of(cfg)}
        self.before = cfg.folder(start, "checkpoints") if start and not cfg.keep_checkpoints else None
        if start:
            self.origin |= {"start": start_of(cfg.folder(start))}
        self.config = {**cfg.of_the_training(name), "data": self.reader.identity, **self.origin}
        self.log, self.accuracy, self.speed, self.memory = None, None, None, None
        if cfg.ema_on_host and dist.world() > 1 and not cfg.lora:
            raise ValueError(f"with {dist.world()} GPUs the EMA is sharded already; drop --ema-on-host.")

    def place(self, net):
        """Fill a net and put it on this rank's device, sharded where there are many ranks.

        With --lora it stays whole on each rank, because the base that the roles share could not be sharded.
        """
        cfg, teacher = self.cfg, not any(p.requires_grad for p in net.parameters())
        self.fast(net)
        if cfg.lora:
            return self.sound(weights.fill(net, self.device)).to(self.device)
        offload = teacher and cfg.offload_teacher
        net = dist.shard(net, cfg.shard_over, offload, cfg.tap_blocks[-1] if teacher else -1)
        net = self.sound(weights.fill(net, "cpu" if offload else self.device))
        return net.to(self.device) if dist.world() == 1 and not offload else net

    def sound(self, net):
        """The net, its weights finite: others would train to nothing, in silence."""
        weights.check_finite(net, self.cfg.model)
        return net

    def fast(self, net) -> None:
        """Attention backend, activation checkpointing and compilation: as the settings say, or as suits this GPU."""
        if self.speed is None:
            half = compute_dtype(self.cfg, self.device)
            config = dict(getattr(net, "net", net).transformer.config)
            self.speed = dist.agreed(speed.chosen(self.cfg, config, self.device, half, backward=True))
            self.speed["checkpointing"] = mode = self.checkpointing(config, self.speed["compiled"])
            how = {"compiled": self.speed["compiled"], "checkpointing": mode}
            asked = watch.asked_of_plan(self.cfg, self.name, self.device, **how)
            self.memory = logs.Memory(self.device, plan(config, **asked)["peak"] if self.device.type == "cuda" else {})
        speed.prepare(net, **self.speed)

    def checkpointing(self, config: dict, compiled: bool) -> str:
        """As the settings say; "auto": what `plan` proposes for these GPUs."""
        cfg = self.cfg
        if cfg.checkpointing != "auto":
            return cfg.checkpointing
        these = watch.asked_of_plan(cfg, self.name, self.device, compiled=compiled)
        mode = dist.agreed(plan(config, **these)["checkpointing"])
        dist.say(f"checkpointing {mode}, chosen by `plan` for {dist.world()} x {these['card_gb']:.3g} GB")
        return mode

    def maker(self, feed: Feed, kind=None):
        """A WanPhase, or a `kind` of it, as these settings want it."""
        cfg = self.cfg
        make = partial(kind or WanPhase, feed=feed, accumulate=self.accumulate, context=cfg.context_parallel,
                       minutes=cfg.save_minutes, verify=cfg.verify, before=self.before)  # fmt: skip
        # GPU memory is what it is about, and the EMA moves once an update
        return partial(make, ema_on="cpu") if cfg.lora or cfg.ema_on_host else make

    def run(self, train, how, read=None) -> WanPhase:
        """Run train(feed, ...), a loop of tmd_minimal, in this GPU's precision. read: the reader's batch or pairs."""
        cfg = self.cfg
        stride = dist.world() // cfg.context_parallel * cfg.micro_batch  # samples of all ranks at once
        feed = Feed(Ahead(self.reader, read or self.reader.batch, stride, cfg.read_ahead))
        kept = {"path": str(self.folder / "checkpoints"), "save_every": self.cfg.save_every, "config": self.config}
        with compute(self.cfg, self.device):
            return train(feed, seed=self.cfg.seed, make=self.maker(feed), on_step=partial(self.on_step, how), **kept)[1]

    def student(self, train, how, student, **kw) -> dict:
        """run(), and the student that it leaves: its description."""
        layers = len(student.net.blocks)
        phase = self.run(train, how, **kw)
        more = {"updates": phase.step, "skipped": phase.skipped, "was_finished_at": phase.ends}
        facts = describe(self.cfg, how, layers, phase=self.name, **more, **self.origin)
        save_student(self.folder, phase, facts)
        return facts

    @watch.watched
    def on_step(self, how, phase: WanPhase, terms: dict) -> None:
        accuracy = self.accuracy.value("disc" in terms) if self.accuracy else None
        if dist.rank() == 0:
            self.log = self.log or logs.Log(self.folder / "log.jsonl", phase.step - 1)
            if memory := self.memory.after(terms):
                words = ", ".join(f"{key.removesuffix('_gb')} {v:.4g}" for key, v in memory.items() if key != "update")
                dist.say(f"{self.name}, first {memory['update']} update, GB of memory: {words}")
                self.log.write(phase.step, {"memory": memory})
            # two in a row: in stage 2 the student's and a critic's
            if phase.step % self.cfg.log_every < 2 or phase.step == 1:
                seen = {"accuracy": accuracy} if "disc" in terms else {}
                self.log.write(phase.step, {**terms, **seen, "seconds": phase.seconds, "skipped": phase.skipped})
            if phase.step % self.cfg.save_every == 0 and not sys.stderr.isatty():  # where there is no bar to look at
                dist.say(f"{self.name}: {phase.step} updates in {phase.seconds:.0f} s")
        if how and self.cfg.preview_every and phase.step % self.cfg.preview_every == 0:
            self.preview(how, phase, accuracy)

    @torch.no_grad()
    def preview(self, how, phase: WanPhase, accuracy: float | None) -> None:
        """Fixed prompts, two seeds each, from the EMA: latents to a file, numbers to the log, alarms to the screen."""
        clips = min(self.cfg.preview_prompts, len(self.reader))
        data, c = self.reader.batch(0, clips)
        mine = range(phase.replica, 2 * clips, phase.replicas)  # clip i is prompt i // 2, seed i % 2
        with phase.ema_weights() as student:
            parts = []
            for k in range(-(-2 * clips // phase.replicas)):  # every rank must call equally often
                i = mine[k] if k < len(mine) else 0
                noise = torch.randn(1, *self.reader.latent_shape, generator=torch.Generator().manual_seed(1000 + i))
                drawn = dist.gather(draw(student, how, noise.to(self.device), c[i // 2][None], seed=i))
                parts.append(drawn[:: self.cfg.context_parallel])  # ranks that share a clip have all of it
        # round by round in the order of ranks is 0, 1, 2, ...
        samples = torch.cat(parts)[: 2 * clips].unflatten(0, (clips, 2))
        if dist.rank():
            return
        numbers = logs.preview_numbers(samples, data)
        self.log.write(phase.step, {"preview": numbers})
        path = self.folder / "previews" / f"step-{phase.step:08d}.safetensors"
        previews.keep(samples, path, self.cfg.model, self.device, compute_dtype(self.cfg, self.device))
        for words in logs.alarms({**numbers, "accuracy": accuracy, "skipped": phase.skipped}):
            print(f"\nALARM {self.name}, update {phase.step}: {words}.", flush=True)
            self.log.write(phase.step, {"alarm": words})


def draw(student, how: WanStudentConfig, noise, c, seed: int):
    """Samples from noise (B, *D) by Algorithm 1, the inner noise from `seed`."""
    inner = torch.Generator(noise.device).manual_seed(seed)
    grids = {"outer_grid": how.outer_grid, "inner_grid": how.inner_grid}
    return tmd.sample(student, noise, c, generator=inner, target=how.target, field=how.field, outer=how.outer, **grids)


@watch.shown_at_end
def alone(cfg: Wan, name: str, work) -> dict:
    """work() -> the description of phase `name`, unless it is finished; one run at a time."""
    if facts := finished(cfg.folder(name), cfg, longer=True):
        return facts
    dist.start(cfg.device, alone=cfg.offload_teacher)
    with only_one(cfg.folder(name), dist.rank()):
        dist.barrier()
        return work()


def stage1(cfg: Wan) -> dict:
    """TM-MF pretraining of the student."""
    return alone(cfg, "stage1", lambda: of_stage1(Training(cfg, "stage1", cfg.shards)))


def of_stage1(job: Training) -> dict:
    cfg, how = job.cfg, job.cfg.how()
    student = make_student(cfg, how, base=shared_base(cfg, how, job.device))
    train = lambda feed, **kw: tmd.train_stage1(job.place(student), feed, how, cfg.stage1(), c_neg=job.c_neg, **kw)
    return job.student(train, how, student)


def kd(cfg: Wan) -> dict:
    """KD warm-up of the DMD2-v baseline on (noise, latent) pairs of the teacher; the paper does it at M = 1 only."""

    def work():
        how, job = cfg.how(plain=True), Training(cfg, "kd", cfg.folder("kd-pairs"))
        student = make_student(cfg, how, base=shared_base(cfg, how, job.device))
        pairs = lambda feed: lambda generator: feed(cfg.micro_batch)
        own = {"updates": cfg.kd_updates, "lr": cfg.kd_lr}
        train = lambda feed, **kw: tmd.train_kd(job.place(student), pairs(feed), how, **own, **kw)
        return job.student(train, how, student, read=job.reader.pairs)

    return alone(cfg, "kd", work)


def stage2(cfg: Wan, plain: bool = False) -> dict:
    """DMD2-v with flow-head rollout, from stage 1's student or, with no stage 1 updates, from the teacher.

    plain: the baseline DMD2-v.
    """
    name = "dmd2v" if plain else "stage2"
    before = ("kd" if cfg.M == 1 and cfg.kd_updates else None) if plain else "stage1" if cfg.stage1_updates else None
    return alone(cfg, name, lambda: of_stage2(Training(cfg, name, cfg.shards, before), plain, before))


def of_stage2(job: Training, plain: bool = False, before: str | None = None) -> dict:
    cfg, how = job.cfg, job.cfg.how(plain)
    base = shared_base(cfg, how, job.device, fake=True)
    student = job.place(make_student(cfg, how, before, base))
    teacher = lora.Role(base) if base else network(cfg, compute_dtype(cfg, job.device)).requires_grad_(False)
    channels = feature_channels(teacher)
    teacher, fake_score = job.place(teacher), job.place(lora.Role(base, "fake") if base else network(cfg))
    tmd.seed_everything(cfg.seed)  # the same discriminator on every rank
    heads, again = len(cfg.tap_blocks), cfg.checkpointing != "none"
    discriminator = WanDiscriminator(channels, cfg.disc_width, heads, checkpointing=again).to(job.device)
    job.accuracy = logs.Accuracy(discriminator)
    own = {"taps": cfg.tap_blocks, "fake_score": fake_score, "c_neg": job.c_neg}
    train = lambda feed, **kw: tmd.train_stage2(student, teacher, discriminator, feed, how, cfg.stage2(), **own, **kw)
    return job.student(train, how, student)


def teacher(cfg: Wan) -> dict:
    """Flow matching of the whole transformer on the shards, for folders made by hand. REPLACES MODEL/transformer."""
    if cfg.teacher_updates < 1:
        what = "teacher replaces MODEL/transformer by what it trained"
        raise ValueError(f"{what}; say for how long with --teacher-updates.")
    if cfg.lora:
        raise ValueError("the teacher is trained in full; leave --lora to the students.")

    def work():
        job = Training(cfg, "teacher", cfg.shards)
        net = job.place(network(cfg))
        rate = {"updates": cfg.teacher_updates, "batch": cfg.micro_batch, "lr": cfg.teacher_lr}
        train = lambda feed, **kw: tmd.train_teacher(net, feed, **rate, c_neg=job.c_neg, **kw)
        phase = job.run(train, how=None)
        whole = dist.whole(phase.ema.named)
        facts = {"phase": "teacher", "updates": phase.step, "recipe": cfg.of_the_training("teacher")}
        if dist.rank() == 0:
            plain, place = load_transformer(cfg.model), Path(cfg.model) / "transformer"
            WanNetwork(plain).load_state_dict(whole, strict=True)
            plain.save_pretrained(place.with_name("transformer.new"))
            # a kill here leaves both; the checkpoints have the weights as well
            place.rename(place.with_name("transformer.old"))
            place.with_name("transformer.new").rename(place)
            shutil.rmtree(place.with_name("transformer.old"))
            describe_finished(job.folder, facts)
        dist.barrier()
        return facts

    return alone(cfg, "teacher", work)
