"""The toy videos are what they claim to be, and the ruler tells good clips from bad ones.

Every threshold follows a measured number.
"""

import math
from itertools import pairwise

import pytest
import torch

from toys.moving_shapes import EMPTY, MOTIONS, SHADES, SHAPES, WORDS, World, decode, encode
from toys.ruler import Ruler

WORLD = World()
PROMPTS = torch.stack([encode(f"{a} {b} {m}") for a in SHADES for b in SHAPES for m in MOTIONS])  # all 30
PARTS = ("quality", "semantic", "motion", "diversity", "total")


@pytest.fixture(scope="module")
def ruler():
    torch.set_num_threads(1)
    return Ruler(WORLD)


@pytest.fixture(scope="module")
def data(ruler):
    """5 clips of every prompt, and their score."""
    c = PROMPTS.repeat(5, 1)
    clips, c, params = WORLD.draw(len(c), torch.Generator().manual_seed(1), c)
    return clips, c, params, ruler.score(clips, c)


@pytest.fixture(scope="module")
def squares(data):
    """The 50 clips of squares among them, for tests that score many times."""
    rows = data[1][:, 1] == WORDS.index("square")
    return data[0][rows], data[1][rows]


# ---------------------------------------------------------------- the renderer


def test_words_round_trip():
    """Every prompt survives encode and decode, tokens are distinct, and the empty word stands last."""
    assert len(set(WORDS)) == len(WORDS) == 11 and WORDS[EMPTY] == "any" and EMPTY == 10
    assert PROMPTS.dtype == torch.int64 and len(PROMPTS.unique(dim=0)) == 30
    for c in [*PROMPTS, torch.tensor([EMPTY] * 3), torch.tensor([0, EMPTY, 9])]:
        assert torch.equal(encode(decode(c)), c)


WRONG = ["", "bright ring", "bright ring circle circle", "ring bright circle", "bright star circle"]


@pytest.mark.parametrize("prompt", WRONG)
def test_encode_lists_the_words(prompt):
    """A wrong number, a wrong order and an unknown word are errors that list the known words."""
    with pytest.raises(ValueError, match=r"dim \| bright; square \| ring \| cross; still \| straight \| bounce"):
        encode(prompt)


def test_clips_are_in_range_and_in_frame(g):
    """Values lie in [-1, 1], every centre stays in its box, and no shape leaves the frame: its ink stays constant."""
    clips, c, params = WORLD.draw(600, g)
    path = WORLD.trajectory(c[:, 2], params)
    assert clips.shape == (600, 1, 8, 16, 16) and clips.dtype == torch.float32 and path.shape == (600, 8, 2)
    assert clips.min() >= -1 and clips.max() <= 1 and clips.max() > 0.95
    assert path.min() >= 0.21 - 1e-5 and path.max() <= 0.79 + 1e-5
    ink = (clips + 1).sum((3, 4))[:, 0]
    assert (ink.amax(1) / ink.amin(1)).max() < 1.08  # measured 1.04 (pixel grid); a shape half outside would give 2
    assert torch.equal(c.amin(0), torch.tensor([0, 2, 5])) and torch.equal(c.amax(0), torch.tensor([1, 4, 9]))


def test_a_generator_fixes_the_draw():
    """The same seed gives the same clips, another seed others; given prompts are kept."""
    a, b, other = (WORLD.draw(30, torch.Generator().manual_seed(s), PROMPTS) for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and torch.equal(a[1], PROMPTS)
    assert (a[0] - other[0]).abs().max() > 0.5


def test_render_puts_the_shape_where_it_is_told():
    """The ink's centre of mass is the path, x along the width and y along the height; bright is twice dim."""
    path = torch.tensor([[[0.3, 0.6], [0.5, 0.5]]]).repeat(3, 1, 1)
    ink = WORLD.render(torch.zeros(3, dtype=torch.long), torch.tensor([2, 3, 4]), path)[:, 0] + 1
    pixels = (torch.arange(16) + 0.5) / 16
    x, y = (ink.sum(2) * pixels).sum(-1), (ink.sum(3) * pixels).sum(-1)
    centre = torch.stack([x, y], -1) / ink.sum((2, 3))[..., None]
    torch.testing.assert_close(centre, path, atol=0.005, rtol=0)
    bright = WORLD.render(torch.ones(3, dtype=torch.long), torch.tensor([2, 3, 4]), path)[:, 0] + 1
    torch.testing.assert_close(bright, 2 * ink)


def test_render_is_smooth_in_the_path():
    """The gradient of a clip in its path is the finite difference (float64)."""
    path = torch.tensor([[[0.31, 0.62], [0.52, 0.47]]], dtype=torch.float64).repeat(3, 1, 1).requires_grad_()
    shade, shape = torch.ones(3, dtype=torch.long), torch.tensor([2, 3, 4])
    assert torch.autograd.gradcheck(lambda p: WORLD.render(shade, shape, p), path)


def test_laws_do_what_they_are_called(g):
    """Still rests, straight keeps its velocity, circle its sense and speed, eight turns both ways, the rest move."""
    path = lambda m: WORLD.trajectory(torch.full((500,), WORDS.index(m)), torch.rand(500, 5, generator=g))
    paths = {m: path(m) * 16 for m in MOTIONS}
    steps = {m: path.diff(dim=1) for m, path in paths.items()}
    assert steps["still"].abs().max() == 0
    assert steps["straight"].diff(dim=1).abs().max() < 1e-4
    cross = lambda s: s[:, :-1, 0] * s[:, 1:, 1] - s[:, :-1, 1] * s[:, 1:, 0]
    turning, length = cross(steps["circle"]).sign(), steps["circle"].norm(dim=2)
    assert (turning == turning[:, :1]).all() and 0.4 < (turning[:, 0] > 0).float().mean() < 0.6
    torch.testing.assert_close(length, length[:, :1].expand_as(length), atol=1e-4, rtol=1e-4)
    eight = cross(steps["eight"]).sign()
    assert ((eight > 0).any(1) & (eight < 0).any(1)).all()
    assert all(steps[m].norm(dim=2).mean(1).min() > 0.75 for m in MOTIONS[1:])  # pixels a frame; measured 0.80


def test_bounces_reflect(g):
    """Every bounce turns round along an axis, with a clear run (over 1.5 pixels) along it before and after."""
    path = WORLD.trajectory(torch.full((500,), WORDS.index("bounce")), torch.rand(500, 5, generator=g)) * 16
    there, back = (path - path.amax(1, keepdim=True)), (path - path.amin(1, keepdim=True))
    turns = []
    for away in (-there, back):  # distance from the extreme place of a coordinate, before and after it is reached
        at = away.argmin(1, keepdim=True)
        before = torch.arange(8)[None, :, None] < at
        turns.append(torch.minimum((away * before).amax(1), (away * ~before).amax(1)))
    assert torch.stack(turns).amax((0, 2)).min() > 1.5
    other = WORLD.trajectory(torch.full((500,), WORDS.index("straight")), torch.rand(500, 5, generator=g))
    v = other.diff(dim=1)
    assert (v[:, :1] * v > -1e-6).all()  # no straight path does


# ---------------------------------------------------------------- the ruler


def test_data_scores_near_one(data):
    """Data have quality, semantic and motion above 0.99 (measured 1.00) and diversity above 0.88 (measured 0.92)."""
    score, worst = data[3], lambda s: min(s[k] for k in ("quality", "semantic", "motion"))
    # five clips a prompt have a noisy spread, so their diversity is under 1
    assert worst(score) > 0.99 and score["diversity"] > 0.88 and score["total"] > 0.96
    for law in MOTIONS:
        assert worst(score["laws"][law]) > 0.98 and score["laws"][law]["total"] > 0.95
    assert all(0 <= score[k] <= 1 for k in PARTS)
    assert score["total"] == pytest.approx(sum(score[k] for k in PARTS[:-1]) / 4)


def test_data_are_fitted_exactly(ruler, data):
    """The nearest valid clip to a datum is the datum: no pixel differs by 0.01 in 98 % of clips (measured 100 %)."""
    found, c, params = ruler.nearest(data[0][:120])
    assert ((found - data[0][:120]).abs().amax((1, 2, 3, 4)) < 0.01).float().mean() > 0.98 and params.shape == (120, 5)
    assert torch.equal(c, data[1][:120])


def test_every_word_is_recovered_under_noise(ruler, data, g):
    """Under noise of std 0.2 the nearest prompt is still the right one for 97 % of clips (measured 100 %)."""
    clips, c = data[:2]
    found = ruler.nearest(clips + 0.2 * torch.randn(clips.shape, generator=g))[1]
    assert (found == c).all(1).float().mean() >= 0.97
    for i, law in enumerate(MOTIONS, 5):
        assert (found[c[:, 2] == i, 2] == i).float().mean() > 0.9, law


def test_noise_and_background_score_near_zero(ruler, data, g):
    """Gaussian noise and an empty clip have total below 0.03 (measured 0.01), quality and motion 0."""
    clips, c = data[0][:120], data[1][:120]
    for fake in (torch.randn(clips.shape, generator=g), -torch.ones_like(clips)):
        score = ruler.score(fake, c)
        assert score["total"] < 0.03 and score["quality"] < 0.01 and score["motion"] < 0.01


def test_a_frozen_clip_loses_motion_only_where_motion_was_asked(ruler, data):
    """A first frame repeated keeps its quality; motion is 1 on still prompts and below 0.01 on every other law."""
    score = ruler.score(data[0][:, :, :1].expand_as(data[0]), data[1])
    assert score["quality"] > 0.99 and score["right_shape"] > 0.99 and score["laws"]["still"]["motion"] > 0.99
    assert all(score["laws"][m]["motion"] < 0.01 and score["laws"][m]["semantic"] == 0 for m in MOTIONS[1:])


def test_moving_clips_lose_on_still_prompts(ruler, squares):
    """Asked to rest, moving clips get motion below 0.1 and never the right motion, whatever they do."""
    moving = squares[1][:, 2] > 5
    clips, c = squares[0][moving], squares[1][moving].clone()
    c[:, 2] = WORDS.index("still")
    score = ruler.score(clips, c)
    assert score["motion"] < 0.1 and score["right_motion"] == 0 and score["quality"] > 0.99


def test_a_repeated_clip_loses_diversity_only(ruler, data):
    """One clip a prompt, repeated: diversity below 0.02, everything else above 0.99."""
    score = ruler.score(data[0][:30].repeat(4, 1, 1, 1, 1), PROMPTS.repeat(4, 1))
    assert score["diversity"] < 0.02 and min(score[k] for k in ("quality", "semantic", "motion")) > 0.99


@pytest.mark.parametrize("slot, word", [(0, "right_shade"), (1, "right_shape"), (2, "right_motion")])
def test_wrong_words_lose_their_own_score(ruler, data, slot, word):
    """Asked for another shade or shape, a clip loses that word alone; for another motion, the motion score too."""
    clips, c = data[0][:120], data[1][:120].clone()
    first, count = ((0, 2), (2, 3), (5, 5))[slot]
    c[:, slot] = first + (c[:, slot] - first + 1) % count
    score = ruler.score(clips, c)
    assert score[word] == 0 and score["semantic"] == 0 and score["quality"] > 0.99
    assert all(score[k] > 0.99 for k in ("right_shade", "right_shape", "right_motion") if k != word)
    assert score["motion"] < 0.25 if slot == 2 else score["motion"] > 0.99


def test_shuffled_frames_lose_quality_and_motion(ruler, data):
    """Frames in another order cost moving clips half of quality and motion, still ones nothing; reversed is valid."""
    clips, c = data[:2]
    shuffled = ruler.score(clips[:, :, [4, 1, 6, 3, 0, 7, 2, 5]], c)["laws"]
    assert all(shuffled[m]["quality"] < 0.5 and shuffled[m]["motion"] < 0.5 for m in MOTIONS[1:]), shuffled
    assert shuffled["still"]["quality"] > 0.99 and shuffled["still"]["motion"] > 0.99
    backwards = ruler.score(clips[:120].flip(2), c[:120])
    assert backwards["quality"] > 0.98 and backwards["motion"] > 0.98 and backwards["semantic"] > 0.98


def test_noise_lowers_quality_step_by_step(ruler, squares, g):
    """Quality falls with the noise, and so does motion."""
    clips, c = squares
    noise = torch.randn(clips.shape, generator=g)
    # measured quality: 1, 0.95, 0.87, 0.74, 0.49 at std 0, 0.02, 0.05, 0.1, 0.2
    scores = [ruler.score(clips + std * noise, c) for std in (0.02, 0.05, 0.1, 0.2)]
    quality = [s["quality"] for s in scores]
    assert all(a - b > 0.05 for a, b in pairwise([1, *quality])) and 0.75 < quality[1] < 0.92
    motion = [s["motion"] for s in scores]
    assert all(a > b for a, b in pairwise(motion)) and motion[-1] > 0.8


def test_quality_is_its_formula(ruler):
    """For a clip with a patch of light in a corner, quality = 1 - |patch| / |shape|, both norms over the background."""
    clips, c, _ = WORLD.draw(4, torch.Generator().manual_seed(0), encode("bright square still").repeat(4, 1))
    lit = clips.clone()
    lit[..., 0, 0] += 1.0
    ink = (clips + 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(ruler.score(lit, c)["clips"]["quality"], 1 - math.sqrt(8) / ink, atol=2e-3, rtol=0)


def test_the_path_is_recovered_without_a_law(ruler, data):
    """Followed frame by frame, the shape is found within 0.05 pixels of where it was drawn."""
    path = WORLD.trajectory(data[1][:, 2], data[2])
    assert 16 * (data[3]["clips"]["path"] - path).norm(dim=2).max() < 0.05


def test_score_is_deterministic_and_does_not_mix_clips(ruler, squares):
    """The same clips give the same numbers bit for bit, also from a new ruler; no clip's score depends on another's."""
    clips, c = squares
    a, b = ruler.score(clips, c), Ruler(World()).score(clips, c)
    assert all(a[k] == b[k] for k in PARTS) and all(torch.equal(a["clips"][k], b["clips"][k]) for k in a["clips"])
    order = torch.arange(49, -1, -1)
    mixed = ruler.score(clips[order], c[order])["clips"]
    for k in ("quality", "motion", "semantic"):
        torch.testing.assert_close(mixed[k], a["clips"][k][order], atol=1e-3, rtol=0)


def test_few_clips_of_a_law_leave_its_diversity_open(ruler, data):
    """A law with under 4 clips of each prompt has diversity nan; when no prompt has 4 clips, that is an error."""
    c = torch.cat([encode("dim ring still").repeat(4, 1), encode("dim ring eight")[None]])
    clips = WORLD.draw(5, torch.Generator().manual_seed(0), c)[0]
    laws = ruler.score(clips, c)["laws"]
    assert math.isnan(laws["eight"]["diversity"]) and laws["still"]["diversity"] > 0.3
    assert set(laws) == {"still", "eight"}
    with pytest.raises(ValueError, match="several clips a prompt"):
        ruler.score(data[0][:90], data[1][:90])


def test_bad_input_is_refused(ruler, data, g):
    """Clips of another world, nan, prompts that do not fit and worlds too small are errors of one sentence."""
    clips, c = data[0][:30], data[1][:30]
    broken = clips.clone()
    broken[3, 0, 1, 2, 3] = torch.nan
    empty = c.clone()
    empty[0, 2] = EMPTY
    for bad, prompts, words in [
        (clips[:, 0], c, "do not fit this world"),
        (clips[..., :12], c, "do not fit this world"),
        (clips[:, :, :7], c, "do not fit this world"),
        (clips[:0], c[:0], "do not fit this world"),
        (broken, c, "nan or inf"),
        (clips, c[:5], "one prompt a clip"),
        (clips, c[:, :2], "integer tokens"),
        (clips, c.float(), "integer tokens"),
        (clips, empty, "wrong or empty word"),
        (clips, c.flip(1), "wrong or empty word"),
    ]:
        with pytest.raises(ValueError, match=words):
            ruler.score(bad, prompts)
    for make in (lambda: World(5, 16), lambda: World(8, 8), lambda: WORLD.draw(3, g, c), lambda: decode(c)):
        with pytest.raises(ValueError, match=r"; .*\.$"):
            make()


def test_a_larger_world_works_by_the_same_code():
    """16 frames of 32 x 32: data score near 1, and a frozen clip loses its motion."""
    world = World(16, 32)
    ruler = Ruler(world)
    c = torch.stack([encode(p) for p in ("bright cross bounce", "dim ring eight")]).repeat(4, 1)
    clips, c, _ = world.draw(8, torch.Generator().manual_seed(0), c)
    score = ruler.score(clips, c)
    assert clips.shape == (8, 1, 16, 32, 32) and min(score[k] for k in ("quality", "semantic", "motion")) > 0.98
    assert ruler.score(clips[:, :, :1].expand_as(clips), c)["motion"] < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clips_on_a_gpu_are_judged_there(ruler, data):
    """Clips on the GPU get the scores they get on the CPU."""
    on_gpu = Ruler(WORLD).score(data[0].cuda(), data[1])
    assert on_gpu["clips"]["quality"].is_cuda and all(on_gpu[k] == pytest.approx(data[3][k], abs=1e-2) for k in PARTS)
