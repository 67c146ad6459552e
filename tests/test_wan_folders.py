"""Weights that are not those of a folder's configs are a sentence before anything is loaded, in every part."""

import json
import shutil

import pytest
import torch

pytest.importorskip("diffusers")
from safetensors.torch import load_file, save_file

from wan_scale import run
from wan_scale.data import text
from wan_scale.data.folders import check_folder, checksums, fingerprint, skeleton
from wan_scale.data.teacher import generate
from wan_scale.data.text import encode_text
from wan_scale.model import load_transformer
from wan_scale.tiny import make_tiny

DIT, T5, VAE = "transformer", "text_encoder", "vae"
FILE = {DIT: "diffusion_pytorch_model.safetensors", T5: "model.safetensors", VAE: "diffusion_pytorch_model.safetensors"}
QUERY = "blocks.0.attn1.to_q.weight"
FIRST = {DIT: QUERY, T5: "encoder.final_layer_norm.weight", VAE: "decoder.conv_in.weight"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("wan") / "tiny")


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "wan")


def change_tensors(folder, part, change):
    """Rewrite a part's weights by change(tensors)."""
    file = folder / part / FILE[part]
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file)


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def prefixed(tensors):
    return {f"model.diffusion_model.{name}": x for name, x in tensors.items()}


def without(name):
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


def renamed(name):
    return lambda tensors: {("other" if key == name else key): x for key, x in tensors.items()}


def shaped(name):
    return lambda tensors: {key: torch.zeros(2, 3) if key == name else x for key, x in tensors.items()}


def fp8(tensors):
    half = {key: x.to(torch.float8_e4m3fn) if x.ndim > 1 else x for key, x in tensors.items()}
    return half | {f"{key.removesuffix('weight')}scale_weight": torch.ones(1) for key, x in half.items() if x.ndim > 1}


def more(**tensors):
    return lambda found: {**found, **{name.replace("__", "."): x for name, x in tensors.items()}}


CASES = [
    (part, name, make(FIRST[part]), words)
    for part in (DIT, T5, VAE)
    for name, make, words in (
        ("missing", without, "is not there"),
        ("renamed", renamed, "is not there, and 1 more"),
        ("wrongly shaped", shaped, r"is of shape \(2, 3\)"),
        ("extra", lambda _: more(extra=torch.zeros(1)), "extra has no place"),
        (
            "prefixed",
            lambda _: prefixed,
            "a copy with 'model.diffusion_model.' before its names; take that",
        ),
        ("scaled fp8", lambda _: fp8, "it looks like scaled fp8; give the original in bfloat16"),
    )
] + [
    (DIT, "plain fp8", lambda t: {k: x.to(torch.float8_e4m3fn) for k, x in t.items()}, "looks like quantised"),
    (DIT, "vace", more(vace_blocks__0__proj_in__weight=torch.zeros(1)), "looks like a VACE checkpoint; give a text-to"),
    (DIT, "image", more(blocks__0__attn2__add_k_proj__weight=torch.zeros(1)), "image-to-video checkpoint; give a text"),
    (DIT, "original names", more(blocks__0__self_attn__q__weight=torch.zeros(1)), "original layout; download Wan-AI"),
    (DIT, "lora", lambda t: {"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1)}, "a LoRA alone; merge it"),
]


@pytest.mark.parametrize(("part", "name", "change", "words"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_weights_that_are_not_the_configs(folder, part, name, change, words):
    """A tensor too few, too many, renamed, of another shape, prefixed or in fp8, and weights of another kind of model:
    one sentence that names the folder, the first tensor and what to do.
    """
    change_tensors(folder, part, change)
    words = words.replace(";", r"\)?;")  # what it looks like stands in brackets
    with pytest.raises(RuntimeError, match=rf"{part} does not hold the weights of this network .*{words}") as error:
        check_folder(folder)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")
    others = [p for p in (DIT, T5, VAE) if p != part]
    assert check_folder(folder, others) == folder  # a part that is not asked for does not count


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        (DIT, {"in_channels": 36}, r"image-to-video checkpoint \(in_channels 36, out_channels 16\)"),
        (DIT, {"image_dim": 1280}, "image-to-video checkpoint"),
        (DIT, {"_class_name": "WanVACETransformer3DModel"}, "is of a WanVACETransformer3DModel, not of a WanTransf"),
        (DIT, {"num_layers": "four"}, "does not describe a WanTransformer3DModel"),
        (VAE, {"latents_mean": None}, "lacks latents_mean of 16 channels; copy it again"),
        (VAE, {"latents_std": [1.0]}, "lacks latents_std of 16 channels; copy it again"),
        (T5, {"architectures": ["T5EncoderModel"]}, "is of a T5EncoderModel, not of a UMT5EncoderModel"),
    ],
)
def test_configs_of_another_model(folder, part, values, words):
    """A config of another kind of model is a sentence that names it."""
    change_json(folder / part / "config.json", **values)
    with pytest.raises((ValueError, RuntimeError), match=words):
        check_folder(folder)


def test_a_vae_without_its_statistics(folder):
    """A VAE's config that lacks the mean of its latents is refused, not given Wan's by default."""
    path = folder / VAE / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "latents_mean"}))
    with pytest.raises(ValueError, match="lacks latents_mean"):
        check_folder(folder)


def test_parts_of_two_downloads(folder, tmp_path):
    """A text encoder of another width than the transformer reads is refused, though each part is whole."""
    shutil.rmtree(folder / T5)
    shutil.copytree(make_tiny(tmp_path / "other", text_dim=48) / T5, folder / T5)
    with pytest.raises(ValueError, match="text_dim of the transformer is 32 and d_model of the text_encoder 48"):
        check_folder(folder)


def test_tied_weights_are_one(folder):
    """UMT5's word embedding may be stored under either of its names, or under both; under none it is missing."""
    word, same = "shared.weight", "encoder.embed_tokens.weight"
    change_tensors(folder, T5, lambda t: {**t, same: t[word].clone()})
    check_folder(folder)
    change_tensors(folder, T5, without(word))
    check_folder(folder)
    change_tensors(folder, T5, without(same))
    with pytest.raises(RuntimeError, match=r"weight is not there"):
        check_folder(folder)


def move(folder, old, new):
    (folder / old).rename(folder / new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda f: move(f, "model_index.json", "Wan2.1_VAE.pth"),
            "original checkpoint.*download Wan-AI/.*-Diffusers",
        ),
        (lambda f: move(f, f"{T5}/{FILE[T5]}", f"{T5}/pytorch_model.bin"), "pytorch_model.bin is not read, download"),
        (lambda f: move(f, f"{VAE}/{FILE[VAE]}", f"{VAE}/a.fp16.safetensors"), "a.fp16.safetensors lies there under"),
        (
            lambda f: move(f, f"{DIT}/{FILE[DIT]}", f"{DIT}/diffusion_pytorch_model-00001-of-00002.safetensors"),
            "copy diffusion_pytorch_model.safetensors.index.json as well",
        ),
        (lambda f: (f / DIT / f"{FILE[DIT]}.index.json").write_text("{}"), "has no weight_map"),
    ],
)
def test_other_downloads(folder, change, words):
    """The original checkpoint, pickled weights, another name, pieces without their index: which file is meant."""
    change(folder)
    with pytest.raises(ValueError, match=words):
        check_folder(folder)


def test_every_road_checks_first(folder, tmp_path, capsys, monkeypatch):
    """`data`, the whole ladder, encode_text and load_transformer refuse before a prompt is embedded; nobody sees a
    tensor without memory.
    """
    monkeypatch.setattr(text.tqdm, "__init__", lambda *a, **k: pytest.fail("a prompt was embedded"))
    (tmp_path / "p.txt").write_text("a red ball\n")
    change_tensors(folder, DIT, without(QUERY))
    for command in ("data", "stage1", "sample", "export", "kd", None):
        given = ["--preset", "tiny", "--model", folder, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out"]
        assert run.main([*([command] if command else []), *map(str, given)]) == 1
        error = capsys.readouterr().err
        assert f"{QUERY} is not there" in error and error.count("\n") == 1
    for road in (load_transformer, lambda f: generate(f, tmp_path / "p.txt", tmp_path / "data")):
        with pytest.raises(RuntimeError, match=f"{QUERY} is not there"):
            road(folder)
    change_tensors(folder, T5, fp8)
    with pytest.raises(RuntimeError, match="scaled fp8"):
        encode_text(folder, {tmp_path / "t.safetensors": {"0": "a ball"}})


def test_a_check_draws_no_random_number(folder):
    """What is drawn after it, a student's first weights, is the same whether a folder is checked first or again."""
    skeleton.cache_clear()
    drawn = []
    for checks in (0, 1, 1):
        torch.manual_seed(0)
        for _ in range(checks):
            check_folder(folder)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_tokenizer_that_does_not_belong(folder, tmp_path):
    """A broken tokenizer, and one of more words than the text encoder knows, are a sentence."""
    job = {tmp_path / "t.safetensors": {"0": "a ball"}}
    words = folder / "tokenizer" / "tokenizer.json"
    whole = words.read_text()
    words.write_text(whole[:100])
    with pytest.raises(ValueError, match="tokenizer cannot be loaded"):
        encode_text(folder, job)
    content = json.loads(whole)
    content["model"]["vocab"] |= {f"word{i}": len(content["model"]["vocab"]) + i for i in range(50)}
    words.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="words and the text encoder"):
        encode_text(folder, job)


@pytest.mark.parametrize("name", ["a", "m", "z"])
def test_a_fingerprint_sees_every_tensor(folder, name):
    """A fine-tuning that leaves the last megabytes of the weights alone is another transformer."""
    state = {key: torch.ones(600_000) for key in "amz"}
    change_tensors(folder, DIT, lambda _: state)
    before = fingerprint(folder, DIT)
    change_tensors(folder, DIT, lambda _: state | {name: 1.01 * state[name]})
    assert fingerprint(folder, DIT) != before


@pytest.mark.parametrize("part, file", [(T5, FILE[T5]), (VAE, FILE[VAE]), (VAE, "config.json"),
                                        ("tokenizer", "tokenizer.json")])  # fmt: skip
def test_a_checksum_sees_every_byte(folder, part, file):
    """One byte of a weight file, a config or the words changes the part's checksum, and no other's."""
    before, path = checksums(folder), folder / part / file
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    after = checksums(folder)
    assert before.keys() == after.keys() == {"tokenizer", T5, VAE}
    assert {key for key in after if after[key] != before[key]} == {part}
