"""Clips from the teacher: its own samples for every prompt, as latents."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch

import tmd_minimal as tmd
from wan_scale.data.files import read_json
from wan_scale.data.folders import check_folder
from wan_scale.data.manifest import make_manifest
from wan_scale.data.prompts import read_prompts
from wan_scale.data.shards import fill
from wan_scale.data.text import read_negative
from wan_scale.seeds import generator


def generate(folder, prompts_file, out, *, rank=0, world=1, steps=50, guidance=5.0, flow_shift=3.0, sampler="unipc",
             frames=81, height=480, width=832, shard_size=64, seed_offset=0, kd=False, skip_layer=None, limit=None,
             device="cpu", dtype=None, fast=None, grow=True) -> int:  # fmt: skip
    """Latents of the teacher for every prompt, by the stock pipeline; returns the number of clips made.

    A clip depends on its prompt and seed (+ seed_offset) alone, not on rank or order. limit: only the first prompts.
    kd: keep the noise as well. skip_layer: leave that block out of the unguided pass (skip-layer guidance; the paper's
    pairs: 10). dtype: by default bfloat16 on a GPU, float32 on a CPU. fast(transformer) may set it up for this GPU
    (speed.stock). grow: of shards.fill. Raises ValueError or RuntimeError in one sentence before anything is loaded.
    """
    folder = check_folder(folder)
    records = read_prompts(prompts_file)[:limit]
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    tmd.choose("sampler", sampler, ("unipc", "euler"))
    layers = read_json(folder / "transformer" / "config.json")["num_layers"]
    if steps < 1 or flow_shift <= 0 or (limit is not None and limit < 1):
        raise ValueError(f"steps is {steps}, flow_shift {flow_shift}, limit {limit}; all must be positive.")
    if skip_layer is not None and not (0 <= skip_layer < layers and guidance > 1):
        blocks = f"a block from 0 to {layers - 1}"
        raise ValueError(f"skip_layer is {skip_layer} at guidance {guidance}; give {blocks} and guidance above 1.")
    manifest = make_manifest(
        folder, "teacher", frames, height, width, sampler=sampler, steps=steps, guidance=guidance,
        flow_shift=flow_shift, skip_layer=skip_layer, seed_offset=seed_offset, kd=kd,
        dtype=str(dtype).removeprefix("torch."), shard_size=shard_size,
    )  # fmt: skip

    def load():
        negative = read_negative(out, manifest["text_length"])
        sample = load_teacher(folder, manifest, negative, device, dtype, fast)

        def make(record, text):
            g = generator(record["seed"] + seed_offset)  # as WanPipeline draws, on the CPU
            noise = torch.randn(1, *manifest["latent_shape"], generator=g)
            x = sample(noise, text)[0].float().cpu()
            return {"latent": x, "noise": noise[0]} if kd else {"latent": x}

        return make

    return fill(folder, out, manifest, records, load, rank=rank, world=world, device=device, grow=grow)


def load_teacher(folder: Path, manifest: dict, negative: torch.Tensor, device, dtype, fast=None):
    """sample(noise (1, C, T, H, W), text) -> normalised latent of that shape: the stock WanPipeline without its VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    if manifest["sampler"] == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=manifest["flow_shift"])
    else:
        config = UniPCMultistepScheduler.load_config(folder, subfolder="scheduler")
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}  # whatever scheduler the folder names
        scheduler = UniPCMultistepScheduler.from_config(config, flow_shift=manifest["flow_shift"], **flow)
    own = {"subfolder": "transformer", "dtype": dtype, "local_files_only": True}
    transformer = WanTransformer3DModel.from_pretrained(folder, **own)
    transformer = transformer.to(device).eval()
    if fast:
        fast(transformer)
    if manifest["skip_layer"] is not None:
        skip_in_unguided(transformer, manifest["skip_layer"])
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    shape = {"num_frames": manifest["frames"], "height": manifest["height"], "width": manifest["width"]}
    how = {"num_inference_steps": manifest["steps"], "guidance_scale": manifest["guidance"], "output_type": "latent"}
    how |= {"negative_prompt_embeds": negative[None].to(device), **shape}
    return lambda noise, text: pipe(latents=noise, prompt_embeds=text[None].to(device), **how).frames


def skip_in_unguided(transformer, layer: int) -> None:
    """Make block `layer` pass its input on in the pipeline's unguided calls.

    The pipeline names these by transformer.cache_context("uncond").
    """
    stock, calls = transformer.cache_context, []

    @contextmanager
    def named(name, **kw):
        calls.append(name)
        with stock(name, **kw):
            yield
        calls.pop()

    transformer.cache_context = named
    skip = lambda block, args, output: args[0] if calls[-1:] == ["uncond"] else None
    transformer.blocks[layer].register_forward_hook(skip)
