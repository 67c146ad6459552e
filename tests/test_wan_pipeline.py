"""The student's pipeline beside diffusers' own: every call gives the same kind of result, or one sentence."""

import json
import random
import shutil
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
import test_wan_sample
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from wan_scale.config import preset
from wan_scale.pipeline import TMDWanModel, TMDWanPipeline
from wan_scale.sampling import sample
from wan_scale.tiny import make_tiny

SIZE = {"height": 32, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    cfg = preset("tiny", model=str(make_tiny(root / "tiny")), out=str(root / "out"))
    test_wan_sample.finish(cfg)
    test_wan_sample.finish(cfg, "dmd2v")
    sample.export(cfg)
    return cfg


def load(cls, folder, **how):
    pipe = cls.from_pretrained(folder, **how)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def both(cfg):
    """diffusers' WanPipeline of the teacher, and ours of the student."""
    return load(WanPipeline, cfg.model), load(TMDWanPipeline, cfg.folder("export"))


def g(seed):
    return torch.Generator().manual_seed(seed)


def kind(pipe, given):
    """What a call gives: the types, and the shape."""
    steps = {} if isinstance(pipe, TMDWanPipeline) else {"num_inference_steps": 1}
    found = pipe(**{**SIZE, **steps, **given})
    frames = found[0] if isinstance(found, tuple) else found.frames
    shape = (len(frames), len(frames[0]), frames[0][0].size) if isinstance(frames, list) else tuple(frames.shape)
    return type(found), type(frames), shape


TEXT, NOISE = torch.zeros(1, 20, 32), torch.zeros(1, 16, 2, 4, 4)
SAME = {
    "a prompt": {"prompt": "a ball"},
    "no words": {"prompt": ""},
    "two prompts": {"prompt": ["a ball", "a cat"]},
    "a generator each": {"prompt": ["a ball", "a cat"], "generator": [g(1), g(2)]},
    "two videos": {"prompt": "a ball", "num_videos_per_prompt": 2},
    "two videos of an embedding": {"prompt_embeds": TEXT, "num_videos_per_prompt": 2},
    "latents": {"prompt": "a ball", "latents": NOISE},
    "np": {"prompt": "a ball", "output_type": "np"},
    "pt": {"prompt": "a ball", "output_type": "pt"},
    "pil": {"prompt": "a ball", "output_type": "pil"},
    "latent": {"prompt": "a ball", "output_type": "latent"},
    "a tuple": {"prompt": "a ball", "return_dict": False},
    "no guidance": {"prompt": "a ball", "guidance_scale": 1.0},
    "one frame": {"prompt": "a ball", "num_frames": 1},
    "another length of text": {"prompt": "a ball", "max_sequence_length": 16},
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_kind_of_result(both, name):
    """Types and shapes are WanPipeline's."""
    assert kind(both[1], SAME[name]) == kind(both[0], SAME[name])


ONE = {"prompt": "a ball"}
REFUSED = [
    ({"prompt": []}, "at least one"),
    ({"prompt": ["a ball", 3]}, "texts alone"),
    ({"prompt": 3}, "has to be of type"),
    ({}, "Provide either"),
    ({**ONE, "prompt_embeds": TEXT}, "give one of them"),
    ({"prompt_embeds": TEXT[0]}, r"\(20, 32\) do not fit; give \(videos, tokens, 32\)"),
    ({"prompt_embeds": TEXT[..., :8]}, r"\(1, 20, 8\) do not fit"),
    ({**ONE, "height": -32}, "5 frames of -32x32 do not fit"),
    ({**ONE, "width": 0}, "5 frames of 32x0 do not fit"),
    ({**ONE, "width": 40}, "multiples of 16 pixels"),
    ({**ONE, "num_frames": 0}, "0 frames"),
    ({**ONE, "num_frames": -3}, "-3 frames"),
    ({**ONE, "num_frames": 8}, r"give 4 k \+ 1 frames"),
    ({**ONE, "num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
    ({**ONE, "num_videos_per_prompt": None}, "num_videos_per_prompt is None"),
    ({**ONE, "max_sequence_length": 0}, "max_sequence_length is 0"),
    ({"prompt": ["a", "b"], "generator": [g(1)]}, "1 generators do not fit 2 videos"),
    ({"prompt": ["a", "b"], "generator": [g(1)] * 3, "latents": NOISE.repeat(2, 1, 1, 1, 1)}, "3 generators do not"),
    ({**ONE, "generator": [None]}, "a torch.Generator for each video"),
    ({"prompt": ["a", "b"], "latents": NOISE}, "latents of 1 videos do not fit 2 videos"),
    ({**ONE, "latents": NOISE[:, :4]}, "do not fit 16 channels"),
    ({**ONE, "output_type": "mp4"}, "output_type is 'mp4'; choose one of 'np', 'pt', 'pil', 'latent'"),
    ({**ONE, "M": 0}, "M is 0"),
    ({**ONE, "N": 0}, "N is 0"),
    ({**ONE, "N": -1}, "N is -1"),
    ({**ONE, "negative_prompt": "a cat"}, "negative_prompt has no place here: a student samples without guidance"),
    ({**ONE, "guidance_scale": 5.0}, "guidance_scale has no place here"),
    ({**ONE, "num_inference_steps": 50}, "num_inference_steps has no place here: a student makes M transitions"),
    ({**ONE, "attention_kwargs": {}}, "attention_kwargs has no place here"),
    ({**ONE, "callback_on_step_end": print}, "callback_on_step_end has no place here"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_call_that_cannot_be(both, given, words):
    """What means nothing to a student, or to anybody, is one sentence, and no setting falls back to another."""
    with pytest.raises(ValueError, match=words) as error:
        both[1](**{**SIZE, **given})
    assert "\n" not in str(error.value)


def test_two_videos_of_one_embedding(both):
    """num_videos_per_prompt repeats an embedding as it repeats a prompt, video by video."""
    pipe = both[1]
    how = {"generator": [g(seed) for seed in range(4)], "num_videos_per_prompt": 2, "output_type": "latent", **SIZE}
    texts = ["a ball", "a cat"]
    c, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=512)
    a = pipe(texts, **how).frames
    how["generator"] = [g(seed) for seed in range(4)]
    b = pipe(prompt_embeds=c, **how).frames
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    how["generator"] = [g(seed) for seed in range(4)]
    other = pipe(prompt_embeds=c.flip(0), **how).frames  # the text matters more than rounding does
    assert (other - b).norm() > 100 * (a - b).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(cfg, both, dtype):
    """torch_dtype=float16 and bfloat16 sample near the float32 latents, with the VAE in half precision, too."""
    half = load(TMDWanPipeline, cfg.folder("export"), dtype=dtype)
    a, b = (pipe("a ball", generator=g(0), output_type="latent", **SIZE).frames.float() for pipe in (both[1], half))
    assert (a - b).norm() / a.norm() < (0.01 if dtype == torch.float16 else 0.1)
    assert half("a ball", generator=g(0), **SIZE).frames.shape == (1, 5, 32, 32, 3)


def test_offloading_and_tiling(both, monkeypatch):
    """The hooks of enable_model_cpu_offload see the student before it works, once a call; without a GPU both pipelines
    say the same. The VAE's tiling decodes in tiles.
    """
    pipe, seen = both[1], []

    class Watch(ModelHook):
        def pre_forward(self, module, *args, **kw):
            seen.append(type(module))
            return args, kw

    from accelerate.hooks import remove_hook_from_module

    add_hook_to_module(pipe.transformer, Watch())
    try:
        pipe("a ball", generator=g(0), output_type="latent", **SIZE)
    finally:
        remove_hook_from_module(pipe.transformer)
    assert seen == [TMDWanModel]
    if not torch.cuda.is_available():
        for one in both:
            with pytest.raises(RuntimeError, match="requires accelerator"):
                one.enable_model_cpu_offload()
    with pytest.raises(ValueError, match="call enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()
    tiles, stock = [], type(pipe.vae).tiled_decode
    monkeypatch.setattr(type(pipe.vae), "tiled_decode", lambda self, *a, **kw: tiles.append(1) or stock(self, *a, **kw))
    for one in both:
        one.vae.enable_tiling(16, 16, 16, 16)
        kind(one, ONE)
        one.vae.disable_tiling()
    assert len(tiles) == 2


def test_no_student(cfg, both, tmp_path):
    """A teacher's folder or transformer, a LoRA, an export that is not whole or not there: a sentence each."""
    stock, pipe = both
    with pytest.raises(ValueError, match="holds a WanPipeline and no student; give a folder that `export` has made"):
        TMDWanPipeline.from_pretrained(cfg.model)
    parts = {name: part for name, part in stock.components.items() if name != "transformer_2"}
    with pytest.raises(ValueError, match="a WanTransformer3DModel is no student"):
        TMDWanPipeline(**parts)
    with pytest.raises(ValueError, match="this pipeline has no student"):
        TMDWanPipeline(**{**parts, "transformer": None})("a ball", **SIZE)
    with pytest.raises(ValueError, match="a LoRA of Wan does not fit a student"):
        pipe.load_lora_weights(cfg.model)
    for part, name in (("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        folder = shutil.copytree(cfg.folder("export"), tmp_path / part)
        file = folder / part / f"{name}.safetensors"
        tensors = load_file(file)
        gone, *_ = tensors
        save_file({key: x for key, x in tensors.items() if key != gone}, file)
        with pytest.raises(RuntimeError, match=f"{part} does not hold the weights of this network .{gone} is not ther"):
            TMDWanPipeline.from_pretrained(folder)
        assert TMDWanPipeline.from_pretrained(folder, **{part: getattr(pipe, part)}).components[part] is not None


def test_a_student_without_a_head_has_no_inner_steps(cfg):
    """DMD2-v takes N = 1 alone; `sample` leaves a given N away and counts one."""
    cfg = preset("tiny", **{key: getattr(cfg, key) for key in ("model", "out")}, student="dmd2v", **{
        "frames": 5, "height": 32, "width": 32, "sample_prompts": 1, "samples_per_prompt": 1,
        "prompts": str(cfg.folder("p.txt")),
    })  # fmt: skip
    cfg.folder("p.txt").write_text("a ball\n")
    pipe = sample.make_pipeline(cfg, torch.device("cpu"))
    with pytest.raises(ValueError, match="N is 3, and a student without a flow head"):
        pipe("a ball", N=3, **SIZE)
    timing = json.loads((sample.sample(cfg, N=3) / "timing.json").read_text())
    assert (timing["N"], timing["effective_nfe"]) == (1, 2.0)


def mutated(file, others, r):
    """Damage a file; returns how."""
    whole, how = file.read_bytes(), r.choice(["cut", "empty", "flip", "swap", "json", "json"])
    i = r.randrange(len(whole))
    content = {
        "cut": whole[:i],
        "empty": b"",
        "flip": whole[:i] + bytes([whole[i] ^ 1 << r.randrange(8)]) + whole[i + 1 :],
    }
    if how == "swap":
        content["swap"] = r.choice(others).read_bytes()
    if how == "json" and file.suffix == ".json":
        values = json.loads(whole)
        key = r.choice(list(values))
        values.pop(key)
        if r.random() < 0.6:
            values[key] = r.choice(["x", None, -1, 0, [], {}, 1e9, True])
        content["json"] = json.dumps(values).encode()
    file.write_bytes(content.get(how, b"\0"))
    return how


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["model", "export"])
def test_damaged_folders(cfg, tmp_path, kind, rounds):
    """Any file of a model folder or an export cut, emptied, flipped, swapped or with another value: a video or one
    sentence of this repository.
    """
    r, source = random.Random(rounds), Path(cfg.model) if kind == "model" else cfg.folder("export")
    files = [f.relative_to(source) for f in sorted(source.rglob("*")) if f.suffix in (".json", ".safetensors")]
    for i in range(rounds):
        folder = shutil.copytree(source, tmp_path / str(i))
        file = r.choice(files)
        how = mutated(folder / file, [source / other for other in files if other != file], r)
        try:
            if kind == "model":
                pipe = sample.make_pipeline(replace(cfg, model=str(folder)), torch.device("cpu"))
            else:
                pipe = load(TMDWanPipeline, folder)
            pipe("a red ball", generator=g(0), output_type="latent", **SIZE)
        except (ValueError, RuntimeError, OSError) as e:
            last = traceback.extract_tb(e.__traceback__)[-1].filename
            assert "\n" not in str(e) and "wan_scale" in last, (file, how, str(e))
        shutil.rmtree(folder)
