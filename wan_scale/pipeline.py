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
        net = WanNetwork(WanTransformer3DModel(**transformer))
        self.how = WanStudentConfig(**{key: how[key] for key in HOW})
        self.student = tmd.TMDStudent(net, self.how.H, self.how.fusion) if self.how.H else tmd.PlainStudent(net)
        self.sampler = None  # of fast()

    @property
    def layers(self) -> int:
        return len(self.student.net.blocks)

    def fast(self, attn: str = "native", compiled: bool = False, graphed: bool = True) -> None:
        """Make sampling fast (speed.py), once the weights are where they will stay. Do not train it afterwards.

        Compiled, the first clip of a size waits for the compiler.
        """
        speed.prepare(self.student.net, attn=attn, compiled=compiled, checkpointing="none", frozen=True)
        self.sampler = speed.GraphedHead(self.student) if graphed and self.how.H else None


class TMDWanPipeline(WanPipeline):
    """WanPipeline whose transformer is a TMDWanModel: M outer transitions of N inner steps, guidance-free.

    `seconds` holds the last call's time by part: text, backbone, head, vae.
    """

    seconds: ClassVar = {}

    def __init__(self, tokenizer, text_encoder, vae, scheduler, transformer: TMDWanModel | None = None,
                 transformer_2=None, boundary_ratio=None, expand_timesteps: bool = False):  # fmt: skip
        # WanPipeline's own arguments, so that its loader finds what it expects; the last three are Wan2.2's
        last = transformer_2, boundary_ratio, expand_timesteps
        super().__init__(tokenizer, text_encoder, vae, scheduler, transformer, *last)

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
    def __call__(self, prompt=None, height: int = 480, width: int = 832, num_frames: int = 81,
                 num_videos_per_prompt: int = 1, generator=None, latents=None, prompt_embeds=None,
                 output_type: str = "np", return_dict: bool = True, max_sequence_length: int = 512,
                 M: int | None = None, N: int | None = None):  # fmt: skip
        """Videos for a prompt or a list of them; M and N default to what the student was trained with.

        `generator`: one, or a list with one for each video, which then depends on its own draws alone.
        Frames are WanPipeline's: (B, T, H, W, 3) in [0, 1].
        """
        if latents is None and (num_frames % 4 != 1 or height % 16 or width % 16):
            size = f"{num_frames} frames of {height}x{width}"
            raise ValueError(f"{size} do not fit; give 4 k + 1 frames and multiples of 16 pixels.")
        self.check_inputs(prompt, None, height, width, prompt_embeds)
        model, device, self.seconds = self.transformer, self._execution_device, {}
        grid = {"M": M or model.how.M, "N": N or model.how.N}
        how = WanStudentConfig(**{key: getattr(model.how, key) for key in HOW} | grid)
        c, _ = self.clock("text", self.encode_prompt)(
            prompt, do_classifier_free_guidance=False, num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds, max_sequence_length=max_sequence_length, device=device,
        )  # fmt: skip
        channels = model.student.net.transformer.config.in_channels
        shape = len(c), channels, height, width, num_frames
        x_1 = self.prepare_latents(*shape, torch.float32, device, generator, latents)
        draws = generator if isinstance(generator, list) else [generator] * len(c)
        seed = lambda g: int(torch.randint(2**62, (1,), generator=g, device=g.device if g else "cpu"))
        inner = [torch.Generator(device).manual_seed(seed(g)) for g in draws]  # of the inner noise
        student = _Timed(model.sampler or model.student, self.clock)
        half = model.student.net.patch.weight.dtype == torch.bfloat16
        same = {"outer_grid": how.outer_grid, "inner_grid": how.inner_grid, "target": how.target}
        same |= {"field": how.field, "outer": how.outer}
        one = lambda i: tmd.sample(student, x_1[i : i + 1], c[i : i + 1], generator=inner[i], **same)
        # without a cache of casts, as GraphedHead records
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if half else nullcontext():
            x = torch.cat([one(i) for i in range(len(c))])
        video = x if output_type == "latent" else self.clock("vae", self.decode)(x, output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def decode(self, latents, output_type: str = "np"):
        """Normalised latents (B, 16, T, H, W) -> video."""
        return decode(self.vae, self.video_processor, latents, output_type)


class _Timed:
    """A student whose two calls are timed."""

    def __init__(self, student, clock):
        self.features, self.head = clock("backbone", student.features), clock("head", student.head)
