"""One clip sampled on a fake card: pipeline.py's own call, from tokens to pixels, with weights that are shapes alone.

    count(preset("1.3b"), WAN["1.3b"])["vae"]["memory"]    # {"weights": bytes, "activations": bytes}

Text encoder, student and VAE lie on the card together, as `sample` has them.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from tqdm import tqdm
from transformers import UMT5Config, UMT5EncoderModel

from wan_scale.config import Wan
from wan_scale.cost.sizes import latent
from wan_scale.pipeline import HOW, TMDWanModel, TMDWanPipeline
from wan_scale.rehearsal.card import card
from wan_scale.rehearsal.ledger import CARD, Ledger
from wan_scale.rehearsal.updates import TEXT, fill
from wan_scale.training import weights

UMT5_XXL = dict(vocab_size=256384, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)  # its width is text_dim
PARTS = {"text": "text encoder", "backbone": "student", "head": "student"}  # the pipeline's: the record's
TILED = "vae, in tiles"


class Counted(TMDWanPipeline):
    """The student's pipeline whose parts are counted where they are timed."""

    def clock(self, part: str, work):
        """work(*args), its peak and its FLOPs added to `found`; what the parts before it left on the card counts."""
        name, ledger = PARTS.get(part, part), self.ledger

        def counted(*args, **kw):
            begin, start, ledger.flops = len(ledger.events), time.perf_counter(), Counter()
            result = work(*args, **kw)
            peak = ledger.peak(begin - 1)  # a plain student's head takes nothing
            held, of_all = self.held[name.split(",")[0]], sum(peak.values()) - peak["weights"]
            old = self.found.get(name, {"memory": {"activations": 0}, "flops": {}, "seconds": 0})
            flops = Counter(old["flops"]) + ledger.flops
            memory = {"weights": held, "activations": max(of_all, old["memory"]["activations"])}
            seconds = round(old["seconds"] + time.perf_counter() - start, 1)
            self.found[name] = {"memory": memory, "flops": dict(flops), "seconds": seconds}
            return result

        return counted


def tokens(prompts, **_):
    """In place of the tokenizer: prompts of TEXT tokens without padding, the longest that Wan takes."""
    ids = torch.ones(len(prompts), TEXT, dtype=torch.long)
    return SimpleNamespace(input_ids=ids, attention_mask=ids)


def pipeline(cfg: Wan, config: dict, ledger: Ledger) -> Counted:
    """What sample.make_pipeline makes, on CARD and without files: bf16, the VAE in float32, the student frozen."""
    how = asdict(cfg.how())
    with init_empty_weights():
        student = TMDWanModel(config, {key: how[key] for key in HOW}).eval()
    fill(ledger, weights.cast(student, torch.bfloat16), CARD)
    with CARD:
        vae = AutoencoderKLWan().eval()  # its defaults are Wan2.1's
        text = UMT5EncoderModel._from_config(UMT5Config(d_model=config["text_dim"], **UMT5_XXL), dtype=torch.bfloat16)
    nets = {"text encoder": text.eval(), "student": student, "vae": vae}
    pipe = Counted(tokens, text, vae, UniPCMultistepScheduler(), student).to(CARD)
    pipe.ledger, pipe.found = ledger, {}
    pipe.held = {name: sum(p.nbytes for p in net.parameters()) for name, net in nets.items()}
    for net in nets.values():
        ledger.name(net.parameters(), "weights")
    pipe.fast(attn="native")
    return pipe


def count(cfg: Wan, config: dict, tiled: bool = False) -> dict:
    """{part: {"memory" (bytes: its own weights; all else on the card at its peak), "flops" (by sort), "seconds"}}.

    tiled: also the VAE's decode in diffusers' tiles, which takes longer to count than everything else together.
    """
    size = {"num_frames": cfg.frames, "height": cfg.height, "width": cfg.width}
    with tqdm(desc="sampling", unit=" operations", mininterval=0.5) as bar, card(1, bar.update) as ledger:
        pipe = pipeline(cfg, config, ledger)
        # "pt": frames on the host are the same computation on the card, and a copy that fake tensors have not
        pipe("a prompt", generator=torch.Generator().manual_seed(cfg.seed), output_type="pt", **size)
        if tiled:
            pipe.vae.enable_tiling()
            x = torch.empty(1, config["in_channels"], *latent(*size.values()), device=CARD)
            with torch.no_grad():
                pipe.clock(TILED, pipe.decode)(x, "pt")
        found = pipe.found
    del pipe
    gc.collect()
    return found
