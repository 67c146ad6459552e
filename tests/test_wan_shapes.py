"""The full ladder distils: a small stock Wan that learnt moving shapes, by the code that trains the large one."""

import json
import math

import pytest
import torch

from toys.moving_shapes import WORDS, encode
from wan_scale import shapes
from wan_scale.data.files import read_json
from wan_scale.data.reader import Reader
from wan_scale.model import WanNetwork, load_transformer


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A folder where run() has done a few updates of everything, and what it returned."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("shapes")
    return out, shapes.run(shapes.settings(out, **shapes.QUICK), samples=12)


def test_quick_run_scores_three_models_at_the_promised_nfe(quick):
    """Folder, shards, teacher, stage 1, stage 2 and scores in one call: three finite rows, student and one-step teacher
    at one NFE.
    """
    out, scores = quick
    assert json.loads((out / "scores.json").read_text()) == scores
    rows = scores["models"]
    assert list(rows) == ["teacher, 50 steps", "teacher, 1 step", "student"]
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())
    assert rows["teacher, 1 step"]["effective_nfe"] == rows["student"]["effective_nfe"] == 2
    for phase, updates in (("teacher", 2), ("stage1", 2), ("stage2", 5)):
        assert read_json(out / phase / "student.json")["updates"] == updates


def test_teacher_replaces_the_folders_transformer(quick, tmp_path):
    """The transformer that the stages load is the trained one, not the random one that the folder began with."""
    before, after = load_transformer(shapes.make_shapes_folder(tmp_path / "wan")), load_transformer(quick[0] / "wan")
    same = [torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(same) < len(same) / 2
    x, c = Reader(quick[0] / "data", text_length=3).batch(0, 2)
    assert WanNetwork(after)(x, torch.full((2,), 0.5), c).shape == x.shape == (2, 1, 8, 12, 12)


def test_reader_gives_back_the_clips_and_their_words(quick):
    """What Reader reads of every clip is the clip that World renders of its prompt and seed, and its text names the
    prompt's words.
    """
    reader = Reader(quick[0] / "data", text_length=3)
    # normalised, and none was dropped
    assert len(reader) == 96 and abs(reader.mean) < 0.1 and abs(reader.std - 1) < 0.1
    records = {
        clip["id"]: clip
        for card in sorted((quick[0] / "data").glob("shard-*.json"))
        for clip in read_json(card)["clips"]
    }
    x, c = reader.batch(0, 96)
    for (_, i), latent, text in zip(reader.at(0, 96), x, c):
        prompt, g = records[i]["prompt"], torch.Generator().manual_seed(records[i]["seed"])
        clip = shapes.WORLD.draw(1, g, encode(prompt)[None])[0]
        torch.testing.assert_close(shapes.to_clips(latent), clip[0], atol=1e-3, rtol=0)  # fp16, of values up to 6
        assert " ".join(WORDS[(shapes.CODE.float() @ word).argmax()] for word in text) == prompt
    assert torch.equal(reader.negative, shapes.CODE[[-1] * 3].float())
    assert {records[i]["prompt"] for i in records} == set(shapes.PROMPTS)


def test_score_knows_data_from_noise():
    """The ruler, fed with normalised latents, gives data nearly 1 and noise nearly 0."""
    prompts = shapes.PROMPTS[:3] * 4
    clips, _, _ = shapes.WORLD.draw(
        12, torch.Generator().manual_seed(1), torch.stack([encode(prompt) for prompt in prompts])
    )
    data, noise = (shapes.score(x, prompts) for x in (shapes.to_latents(clips), torch.randn(12, 1, 8, 12, 12)))
    assert data["quality"] > 0.99 and data["semantic"] > 0.9 and data["total"] > 0.9 > 0.2 > noise["total"]


@pytest.mark.slow
def test_student_beats_the_teacher_at_equal_nfe(tmp_path):
    """On the same noise and prompts the student is far above the teacher's one guided step, which costs the same; so is
    the teacher's own path of 50 steps.
    """
    torch.set_num_threads(1)
    rows = shapes.run(shapes.settings(tmp_path))["models"]
    many, one, student = (rows[name] for name in ("teacher, 50 steps", "teacher, 1 step", "student"))
    assert student["effective_nfe"] == one["effective_nfe"]
    margin = 5 * math.hypot(student["error"], one["error"])
    assert student["total"] > one["total"] + margin
    assert many["total"] > one["total"] + margin
