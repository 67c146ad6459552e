"""The distilled student as a diffusers pipeline: saved and loaded as a folder, called like WanPipeline, no guidance.

from wan_scale.pipeline import TMDWanPipeline
dtype = {"vae": torch.float32, "default": torch.bfloat16}
pipe = TMDWanPipeline.from_pretrained("runs/wan-1.3b/export", dtype=dtype).to("cuda")
pipe.fast(attn="cudnn")  # optional: another attention backend, compiled blocks, the flow head as a CUDA graph
g = torch.Generator().manual_seed(0)
video = pipe("a cat on the beach", num_frames=81, height=480, width=832, generator=g).frames[0]
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import (  # ModelMixin by name: the loader looks for it here
    ConfigMixin,
    ModelMixin,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

import tmd_minimal as tmd
from wan_scale import speed
from wan_scale.config import WanStudentConfig
from wan_scale.data.folders import PARTS, check_folder, check_words, loading
from wan_scale.model import WanNetwork
from wan_scale.pictures import decode

# what sampling needs of a StudentConfig
HOW = ("M", "N", "H", "fusion", "target", "field", "outer", "outer_shift", "inner_shift")


class TMDWanModel(ModelMixin, ConfigMixin):
    """A TMD student (H = 0: DMD2-v) with its config, saved as diffusers does: config.json and safetensors."""

    _keep_in_fp32_modules: ClassVar = [*WanTransformer3DModel._keep_in_fp32_modules, "span", "fuse", "gate"]
    _no_split_modules: ClassVar = ["WanTransformerBlock"]

    @register_to_config
    def __init__(self, transformer: dict, how: dict, recipe: dict | None = None):
        super().__init__()
        net = WanNetwork(WanTransformer3DModel.from_config(transformer))  # leaves out what a newer version has added
        self.how = WanStudentConfig(**{key: how[key] for key in HOW})
        self.student = tmd.TMDStudent(net, self.how.H, self.how.fusion) if self.how.H else tmd.PlainStudent(net)
        self.sampler = None  # of fast()

    @property
    def layers(self) -> int:
        return len(self.student.net.blocks)

    def forward(self, work):
        """work(), with this model where it computes: through here diffusers' offloading sees that it is called."""
        return work()

    def fast(self, attn: str = "native", compiled: bool = False, graphed: bool = True) -> None:
        """Make sampling fast (speed.py), once the weights are where they will stay. Do not train it afterwards.

        Compiled, the first clip of a size waits for the compiler.
        """
        speed.prepare(self.student.net, attn=attn, compiled=compiled, checkpointing="none", frozen=True)
        self.sampler = speed.GraphedHead(self.student) if graphed and self.how.H else None


# arguments of WanPipeline that mean nothing here: why
STOCK_ONLY = {
    "negative_prompt": "a student samples without guidance",
    "negative_prompt_embeds": "a student samples without guidance",
    "guidance_scale": "a student samples without guidance",
    "guidance_scale_2": "a student samples without guidance",
    "num_inference_steps": "a student makes M transitions of N steps (M=, N=)",
    "attention_kwargs": "the blocks are called one by one",
    "callback_on_step_end": "each video is made whole, in a step or two",
}
OUTPUTS = ("np", "pt", "pil", "latent")


class TMDWanPipeline(WanPipeline):
    """WanPipeline whose transformer is a TMDWanModel: M outer transitions of N inner steps, guidance-free.

    `seconds` holds the last call's time by part: text, backbone, head, vae.
    """

    seconds: ClassVar = {}

    def __init__(self, tokenizer, text_encoder, vae, scheduler, transformer: TMDWanModel | None = None,
                 transformer_2=None, boundary_ratio=None, expand_timesteps: bool = False):  # fmt: skip
        if transformer is not None and not isinstance(transformer, TMDWanModel):
            raise ValueError(f"a {type(transformer).__name__} is no student; load a folder that `export` has made.")
        # WanPipeline's own arguments, so that its loader finds what it expects; the last three are Wan2.2's
        last = transformer_2, boundary_ratio, expand_timesteps
        super().__init__(tokenizer, text_encoder, vae, scheduler, transformer, *last)

    @classmethod
    def from_pretrained(cls, folder, **how):
        """WanPipeline's, after every weight of a local folder was compared with its configs.

        RAISES ValueError or RuntimeError in a sentence where the folder is no export or is not whole.
        """
        if Path(folder).is_dir() and not how.get("variant"):
            parts = [part for part in PARTS if part not in how]
            check_folder(folder, parts, own={"transformer": TMDWanModel})
        with loading(folder):
            pipe = super().from_pretrained(folder, **how)
        if pipe.tokenizer is not None and pipe.text_encoder is not None:
            check_words(folder, pipe.tokenizer, pipe.text_encoder)
        return pipe

    def load_lora_weights(self, *_, **__):
        """Not for a student."""
        what = "a LoRA of Wan does not fit a student, whose blocks were trained further"
        raise ValueError(f"{what}; merge it into the teacher's folder and distil that.")

    def enable_sequential_cpu_offload(self, *_, **__):
        """Not for a student."""
        raise ValueError("a student is not offloaded layer by layer; call enable_model_cpu_offload().")

    def fast(self, **how) -> None:
        """Call when the pipeline is on its GPU: TMDWanModel.fast."""
        self.transformer.fast(**how)

    def clock(self, part: str, work):
        """work(*args), its time added to `seconds`."""

        def timed(*args, **kw):
            wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
            wait()
            start = time.perf_counter()
            result = work(*args, **kw)
            wait()
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            return result

        return timed

    @torch.no_grad()
    def __call__(self, prompt=None, negative_prompt=None, height: int = 480, width: int = 832, num_frames: int = 81,
                 num_inference_steps=None, guidance_scale=None, guidance_scale_2=None, num_videos_per_prompt: int = 1,
                 generator=None, latents=None, prompt_embeds=None, negative_prompt_embeds=None,
                 output_type: str = "np", return_dict: bool = True, attention_kwargs=None, callback_on_step_end=None,
                 callback_on_step_end_tensor_inputs=None, max_sequence_length: int = 512, *,
                 M: int | None = None, N: int | None = None):  # fmt: skip
        """Videos for a prompt or a list of them; M and N default to what the student was trained with.

        `generator`: one, or a list with one for each video, which then depends on its own draws alone.
        Frames are WanPipeline's: (B, T, H, W, 3) in [0, 1]. Its arguments stand in its order; those that mean nothing
        to a student are a ValueError.
        """
        given = locals()
        for name, why in STOCK_ONLY.items():
            if given[name] is not None and not (name == "guidance_scale" and guidance_scale <= 1):
                raise ValueError(f"{name} has no place here: {why}; leave it away.")
        if self.transformer is None:
            raise ValueError("this pipeline has no student; load a folder that `export` has made.")
        counts = {"num_videos_per_prompt": num_videos_per_prompt, "max_sequence_length": max_sequence_length}
        self.check_call(prompt, prompt_embeds, (num_frames, height, width), latents, generator, output_type, counts)
        self.check_inputs(prompt, None, height, width, prompt_embeds)
        model, device, self.seconds = self.transformer, self._execution_device, {}
        grid = {"M": model.how.M if M is None else M, "N": model.how.N if N is None else N}
        if wrong := [f"{name} is {value}" for name, value in grid.items() if type(value) is not int]:
            raise ValueError(f"{wrong[0]}; give a whole number.")
        if not model.how.H and grid["N"] != 1:
            raise ValueError(f"N is {grid['N']}, and a student without a flow head (DMD2-v) has N = 1; leave it away.")
        how = WanStudentConfig(**{key: getattr(model.how, key) for key in HOW} | grid)
        c, _ = self.clock("text", self.encode_prompt)(
            prompt, do_classifier_free_guidance=False, prompt_embeds=prompt_embeds, device=device, **counts
        )
        c = c if prompt_embeds is None else c.to(device).repeat_interleave(num_videos_per_prompt, 0)
        draws = generator if isinstance(generator, list) else [generator] * len(c)
        if len(draws) != len(c) or (latents is not None and len(latents) != len(c)):
            made = f"{len(draws)} generators" if len(draws) != len(c) else f"latents of {len(latents)} videos"
            raise ValueError(f"{made} do not fit {len(c)} videos; give one for each.")
        channels = model.student.net.transformer.config.in_channels
        shape = len(c), channels, height, width, num_frames
        x_1 = self.prepare_latents(*shape, torch.float32, device, generator, latents)
        seed = lambda g: int(torch.randint(2**62, (1,), generator=g, device=g.device if g else "cpu"))
        inner = [torch.Generator(device).manual_seed(seed(g)) for g in draws]  # of the inner noise
        student = _Timed(model.sampler or model.student, self.clock)
        dtype = model.student.net.patch.weight.dtype
        same = {"outer_grid": how.outer_grid, "inner_grid": how.inner_grid, "target": how.target}
        same |= {"field": how.field, "outer": how.outer}
        one = lambda i: tmd.sample(student, x_1[i : i + 1], c[i : i + 1], generator=inner[i], **same)
        # without a cache of casts, as GraphedHead records
        half = torch.autocast(device.type, dtype, cache_enabled=False) if dtype.itemsize == 2 else nullcontext()
        with half:
            x = model(lambda: torch.cat([one(i) for i in range(len(c))]))
        video = x if output_type == "latent" else self.clock("vae", self.decode)(x, output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def check_call(self, prompt, embeds, size, latents, generator, output_type, counts: dict) -> None:
        """ValueError in a sentence for what WanPipeline would meet later, or take without a word."""
        frames, height, width = size
        if latents is None and (frames % 4 != 1 or height % 16 or width % 16 or min(size) < 1):
            told = f"{frames} frames of {height}x{width}"
            raise ValueError(f"{told} do not fit; give 4 k + 1 frames and multiples of 16 pixels.")
        if prompt is not None and embeds is not None:
            raise ValueError("prompt and prompt_embeds say the same; give one of them.")
        if isinstance(prompt, list) and not (prompt and all(isinstance(text, str) for text in prompt)):
            raise ValueError("a list of prompts holds at least one, and texts alone; give a text or a list of them.")
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if isinstance(generator, list) and not all(isinstance(g, torch.Generator) for g in generator):
            raise ValueError("a list of generators holds a torch.Generator for each video; give those, or one.")
        dim = self.transformer.student.net.transformer.config.text_dim
        if embeds is not None and (embeds.ndim != 3 or embeds.shape[-1] != dim or not embeds.numel()):
            raise ValueError(f"prompt_embeds of shape {tuple(embeds.shape)} do not fit; give (videos, tokens, {dim}).")
        tmd.choose("output_type", output_type, OUTPUTS)

    def decode(self, latents, output_type: str = "np"):
        """Normalised latents (B, 16, T, H, W) -> video."""
        return decode(self.vae, self.video_processor, latents, output_type)


class _Timed:
    """A student whose two calls are timed."""

    def __init__(self, student, clock):
        self.features, self.head = clock("backbone", student.features), clock("head", student.head)
