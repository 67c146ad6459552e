"""A complete Wan2.1 folder in the Hugging Face layout, small enough for a laptop: random weights, the real classes.

Everything that reads a real checkpoint folder runs on this one, in tests and with `--preset tiny`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from wan_scale.config import Wan
from wan_scale.data.files import atomic, writing

WORDS = (
    "a the red green blue small big ball cube cat dog runs jumps sits left right up down on in of sea sand snow "
    "still slow fast"
).split()
PROMPTS = """a red ball, a blue cube, a green cat runs, a small dog jumps, the big ball left, the red cube right,
a cat sits, a dog on the sand, the blue ball up, a small cube down, a big cat in the snow, the dog runs fast,
a red cat slow, a still cube, the green ball in the sea, the small ball jumps""".replace("\n", " ").split(", ")
TRANSFORMER = dict(num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=4, text_dim=32, freq_dim=32)


def tokenizer():
    """Words of WORDS by number, anything else is <unk>; pads and ends as UMT5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *WORDS]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


@torch.no_grad()
def fitted(vae):
    """The VAE with the means and deviations of its own latents in its config, in place of Wan's, which do not fit it.

    Else every video would be dropped as flat.
    """
    g = torch.Generator().manual_seed(0)
    video = torch.nn.functional.interpolate(torch.randn(1, 3, 5, 6, 6, generator=g), (9, 64, 64), mode="trilinear")
    z = vae.encode(video.clamp(-1, 1)).latent_dist.mode()[0].flatten(1)
    vae.register_to_config(latents_mean=z.mean(1).tolist(), latents_std=z.std(1).tolist())
    return vae


def make_tiny(folder: str | Path, seed: int = 0, **transformer) -> Path:
    """Write the folder (once: a finished one is left alone); `transformer` overrides fields of its config.

    Returns its path.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    folder = Path(folder)
    if (folder / "model_index.json").exists():
        return folder
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    config = {**TRANSFORMER, **transformer}
    text = UMT5Config(
        vocab_size=3 + len(WORDS), d_model=config["text_dim"], d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        transformer=WanTransformer3DModel(**config),
        vae=fitted(AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    torch.set_rng_state(before)
    temporary = folder.with_name(folder.name + ".tmp")  # a kill leaves no half folder under the real name
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(folder):
        pipe.save_pretrained(temporary, safe_serialization=True)
        os.replace(temporary, folder)
    return folder


def tiny_world(cfg: Wan) -> Wan:
    """The preset tiny's own folder and prompts, where none are given."""
    from wan_scale.training import dist

    torch.set_num_threads(1)  # so small that a second thread only waits
    dist.start(cfg.device)
    model, prompts = cfg.model or str(cfg.folder("tiny-wan")), cfg.prompts or str(cfg.folder("prompts.txt"))
    if dist.rank() == 0:
        cfg.folder().mkdir(parents=True, exist_ok=True)
        if not cfg.model:
            make_tiny(model, cfg.seed)
        if not cfg.prompts and not Path(prompts).exists():  # an edited one stays
            with atomic(Path(prompts)) as file:
                file.write("\n".join([*PROMPTS, ""]).encode())
    dist.barrier()
    return replace(cfg, model=model, prompts=prompts)
