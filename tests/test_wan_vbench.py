"""VBench's arithmetic and layout, and the cheap scores, against published tables and clips whose scores are known."""

import json
import math
import re
from itertools import combinations

import numpy as np
import pytest
import torch

from wan_scale.data.files import write_json
from wan_scale.pictures import write_video
from wan_scale.sampling import cheap_metrics as cheap
from wan_scale.sampling import vbench

FULL = {name: high for name, (_, high, _) in vbench.DIMENSIONS.items()}  # every dimension at the top of its range
ORDER = [
    *(
        "subject_consistency",
        "background_consistency",
        "temporal_flickering",
        "motion_smoothness",
        "dynamic_degree",
        "aesthetic_quality",
    ),
    *("imaging_quality", "object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene"),
    *("appearance_style", "temporal_style", "overall_consistency"),
]
# arXiv 2503.19462 (AccVideo), Tables 4 and 5, in per cent: total, quality, semantic, then the dimensions in ORDER
PUBLISHED = {
    "VideoCrafter2": "80.44 82.20 73.42 96.85 98.22 98.41 97.73 42.50 63.13 67.22 "
    "92.55 40.66 95.00 92.92 35.86 55.29 25.13 25.84 28.23",
    "T2V-Turbo-V2": "83.52 85.13 77.12 95.50 96.71 97.35 97.07 90.00 62.61 71.78 "
    "95.33 61.49 96.20 92.53 43.32 56.40 24.17 27.06 28.26",
    "CogVideoX": "81.61 82.75 77.04 96.23 96.52 98.66 96.92 70.97 61.98 62.90 "
    "85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59",
    "PyramidFlow": "81.72 84.74 69.62 96.95 98.06 99.49 99.12 64.63 63.26 65.01 "
    "86.67 50.71 85.60 82.87 59.53 43.20 20.91 23.09 26.23",
    "HunyuanVideo": "83.24 85.09 75.82 97.37 97.76 99.44 98.99 70.83 60.36 67.56 "
    "86.10 68.55 94.40 91.60 68.68 53.88 19.80 23.89 26.44",
}


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# ---------------------------------------------------------------- VBench's arithmetic


@pytest.mark.parametrize("model", PUBLISHED)
def test_aggregate_gives_the_published_totals(model):
    """Five public rows of 16 dimensions (arXiv 2503.19462, Tables 4 and 5) fold into their printed totals to within
    rounding.
    """
    total, quality, semantic, *raw = map(float, PUBLISHED[model].split())
    scores = vbench.aggregate({name: x / 100 for name, x in zip(ORDER, raw, strict=True)})
    assert set(ORDER) == set(vbench.DIMENSIONS)
    for name, printed in (("total", total), ("quality", quality), ("semantic", semantic)):
        assert abs(scores[name] - printed) < 0.0101, name  # raw scores rounded to 0.01, and so is the print


def test_the_ends_of_the_ranges_are_0_and_100():
    """All dimensions at their maximum give 100 three times, at their minimum 0; beyond the range nothing is clamped."""
    for end, expected in ((1, 100.0), (0, 0.0)):
        scores = vbench.aggregate(
            {name: bounds[end] for name, bounds in ((n, (b[0], b[1])) for n, b in vbench.DIMENSIONS.items())}
        )
        for name in ("total", "quality", "semantic"):
            assert scores[name] == pytest.approx(expected, abs=1e-9)
        assert set(scores["normalised"]) == set(vbench.DIMENSIONS)
    assert (
        vbench.aggregate({**FULL, "scene": 1.0})["normalised"]["scene"]
        > 100
        > vbench.aggregate({**FULL, "scene": 0.8})["semantic"]
    )


@pytest.mark.parametrize("name", vbench.DIMENSIONS)
def test_one_dimension_moves_the_total_by_its_weight(name):
    """A raw drop d moves the total by 0.8 w / 6.5 (quality, dynamic degree w = 1/2) or 0.2 / 9 (semantic) times d over
    the range.
    """
    low, high, weight = vbench.DIMENSIONS[name]
    moved = 100 - vbench.aggregate({**FULL, name: high - 0.1})["total"]
    share = 0.8 * (0.5 if name == "dynamic_degree" else 1) / 6.5 if name in vbench.QUALITY else 0.2 / 9
    assert moved == pytest.approx(100 * share * 0.1 / (high - low), rel=1e-9) and weight == (
        0.5 if name == "dynamic_degree" else 1
    )


def test_seven_dimensions_of_quality_and_nine_of_semantics():
    """The groups are VBench 1.0's, and names with spaces are the same dimensions."""
    assert len(vbench.QUALITY) == 7 and len(vbench.SEMANTIC) == 9 and len(vbench.DIMENSIONS) == 16
    spaced = {name.replace("_", " "): 0.7 for name in FULL}
    assert vbench.aggregate(spaced) == vbench.aggregate({name: 0.7 for name in FULL})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scene": math.nan}, "scene = nan"),
        ({"imaging_quality": 67.2}, "imaging_quality = 67.2"),  # early VBench reports it in 0 to 100
        ({"color": -0.01}, "color = -0.01"),
        ({"color": math.inf}, "color = inf"),
        ({"color": None}, "color = None"),
        ({"color": True}, "color = True"),
        ({"camera_motion": 0.5}, "camera_motion (unknown)"),
        ({"human action": 0.5}, "spelled in two ways"),
    ],
)
def test_aggregate_refuses_what_is_no_score(change, said):
    """NaN, percentages, negative, non-numbers, unknown and doubled dimensions are one sentence that names them."""
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        vbench.aggregate({**FULL, **change})
    assert str(error.value).count("; ") == 1 and str(error.value).endswith(".")


def test_aggregate_names_all_that_is_missing():
    """Fifteen or fewer dimensions are no total; every absent one is listed."""
    with pytest.raises(ValueError, match=r"scene \(missing\), temporal_style \(missing\)"):
        vbench.aggregate({name: x for name, x in FULL.items() if name not in ("scene", "temporal_style")})


# ---------------------------------------------------------------- prompts and files


def records():
    return [
        {"prompt_en": "a red bicycle", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
        {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
        {
            "prompt_en": "The bund Shanghai, oil painting",
            "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"],
        },
        {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["appearance_style"]},
        # a later row must not lower 25 to 5
        {"prompt_en": "In a still frame, a stop sign", "dimension": ["object_class"]},
    ]


def test_plan_follows_vbench_names_and_counts(tmp_path):
    """Five clips a prompt and 25 for temporal flickering, `prompt-index.mp4`, rows of one prompt merged, no two names
    or seeds alike.
    """
    read = vbench.read_prompts(write(tmp_path / "VBench_full_info.json", records()))
    assert read == records()
    plan = vbench.plan_videos(read)
    names = [video.name for video in plan]
    assert len(plan) == 5 + 25 + 5 == len(set(names)) == len({video.seed for video in plan})
    assert names[0] == "a red bicycle-0.mp4" and names[29] == "In a still frame, a stop sign-24.mp4"
    assert plan[0][:3] == ("a red bicycle", 0, names[0]) and all(0 <= video.seed < 2**48 for video in plan)
    assert len(vbench.plan_videos(read, samples=1, flickering_samples=2)) == 4


def test_seeds_depend_on_the_name_alone():
    """Other order, fewer prompts, fewer samples: a clip keeps its seed, so ranks and reruns agree; the value is fixed
    for good.
    """
    seeds = {video.name: video.seed for video in vbench.plan_videos(records())}
    again = vbench.plan_videos(records()[2::-1][:2], samples=2, flickering_samples=3)
    assert len(again) == 5 and all(seeds[video.name] == video.seed for video in again)
    assert seeds["a red bicycle-0.mp4"] == 88275080996663


@pytest.mark.parametrize("prompt", ["a cat and/or a dog", "x" * 250, "a\0b"])
def test_a_prompt_that_is_no_file_name_is_refused(prompt):
    """VBench looks clips up by the literal prompt, so a prompt that cannot be a name is an error and never a changed
    name.
    """
    with pytest.raises(ValueError, match="cannot be a file name"):
        vbench.plan_videos([{"prompt_en": prompt, "dimension": ["color"]}])


def test_missing_counts_what_is_not_whole_or_of_another_seed(tmp_path):
    """A video that was written from its seed is done; an absent, empty or cut one is not, nor one of another seed, of a
    rewritten text or of another maker.
    """
    plan, made = vbench.plan_videos(records(), samples=2, flickering_samples=2), {"student": "a"}
    for video, seed in zip(plan[:3], (plan[0].seed, 7, plan[2].seed)):
        comment = vbench.label(video._replace(seed=seed), made)
        write_video(smooth(0, 3).numpy(), tmp_path / video.name, comment=comment)
    cut = tmp_path / plan[2].name
    cut.write_bytes(cut.read_bytes()[:-1])
    (tmp_path / plan[3].name).touch()
    assert vbench.missing(tmp_path, plan, made) == plan[1:] and vbench.missing(tmp_path / "none", plan, made) == plan
    assert vbench.missing(tmp_path, [plan[0]._replace(prompt="a longer text")], made)
    assert vbench.missing(tmp_path, plan[:1], {"student": "b"})


def test_a_video_belongs_to_its_folder_and_its_name(tmp_path):
    """Two mp4s swapped between folders, one renamed within its own, and made.json of another are told before a score;
    what others made has no mark and passes.
    """
    two = [video for video in vbench.plan_videos(records(), samples=2) if video.index == 0][:2]
    made = {who: {"student": who, "guidance": 5.0} for who in "ab"}
    for who in "ab":
        (tmp_path / who).mkdir()
        write_json(tmp_path / who / "made.json", made[who])
        for video in two if who == "a" else two[:1]:
            write_video(smooth(0, 3).numpy(), tmp_path / who / video.name, comment=vbench.label(video, made[who]))
    check = lambda: [vbench.check_marks(tmp_path / who) for who in "ab"]
    assert check() == [made["a"], made["b"]]

    def swap(one, other):
        data = [(tmp_path / path).read_bytes() for path in (one, other)]
        for path, bytes in zip((other, one), data):
            (tmp_path / path).write_bytes(bytes)

    name, other = (video.name for video in two)
    for pair in ((f"a/{name}", f"b/{name}"), (f"a/{name}", f"a/{other}"), ("a/made.json", "b/made.json")):
        swap(*pair)
        with pytest.raises(RuntimeError, match=r"mp4 was not made as .*made\.json says, or under another name; put it"):
            check()
        swap(*pair)
    write_video(smooth(0, 3).numpy(), tmp_path / "b" / "x-0.mp4", comment="seed 1")
    assert check()


def test_rewritten_prompts_change_the_text_and_not_the_name(tmp_path):
    """The model reads the long text; names and seeds stay those of the short prompt; files that do not pair up are
    refused.
    """
    plain, long = tmp_path / "all_dimension.txt", tmp_path / "augmented.txt"
    prompts = [record["prompt_en"] for record in records()]
    # VBench's file has blanks at ends of lines
    plain.write_text("\n".join(f"{p} " for p in prompts) + "\n", encoding="utf-8")
    long.write_text("\n".join(f"{p}, in\u2028detail" for p in prompts), encoding="utf-8")
    rewritten = vbench.read_rewritten(plain, long)
    plan, short = vbench.plan_videos(records(), rewritten=rewritten), vbench.plan_videos(records())
    assert [video[1:] for video in plan] == [video[1:] for video in short]
    assert [video.prompt for video in plan] == [f"{video.prompt}, in\u2028detail" for video in short]
    long.write_text("one line", encoding="utf-8")
    with pytest.raises(ValueError, match=r"5 lines and .* has 1;"):
        vbench.read_rewritten(plain, long)
    with pytest.raises(ValueError, match="3 of 3 prompts have no rewritten text"):
        vbench.plan_videos(records(), rewritten={})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"prompt_en": "x"}, "not a list"),
        ([], "not a list"),
        ([{"prompt_en": "x", "dimension": "color"}], 'no "dimension" list'),
        ([{"prompt_en": " ", "dimension": ["color"]}], "row 0"),
        ([{"prompt_en": "x", "dimension": ["color"]}, "x"], "row 1"),
        ([{"prompt_en": "x", "dimension": ["Human_Anatomy"]}], "version 1.0"),
    ],
)
def test_a_prompt_list_of_another_layout_is_refused(tmp_path, content, said):
    """A file that is not VBench 1.0's (VBench 2.0's has other dimensions) is one sentence, and so is none at all."""
    with pytest.raises(ValueError, match=said):
        vbench.read_prompts(write(tmp_path / "info.json", content))
    with pytest.raises(ValueError, match="cannot be read"):
        vbench.read_prompts(tmp_path / "absent.json")


# ---------------------------------------------------------------- results


def result(score):
    return [score, [{"video_path": "a red bicycle-0.mp4", "video_results": score}]]


def test_results_from_one_file_or_many_are_the_same(tmp_path):
    """One file of 16 dimensions, 16 files of one and an agreeing repetition read alike, and aggregate; *_full_info.json
    is left alone.
    """
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    scores = {name: 0.3 + i / 100 for i, name in enumerate(FULL)}
    write(one / "results_1_eval_results.json", {name: result(x) for name, x in scores.items()})
    write(one / "results_1_full_info.json", records())
    for name, x in scores.items():
        write(many / f"{name}_eval_results.json", {name.replace("_", " "): result(x)})
    write(many / "again_eval_results.json", {"scene": result(scores["scene"])})
    assert vbench.read_results(one) == vbench.read_results(many) == scores
    assert vbench.aggregate(vbench.read_results(many)) == vbench.aggregate(scores)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no"),
        ({"a": {"scene": result(0.5)}, "b": {"scene": result(0.6)}}, "says scene = 0.5 and .* says 0.6"),
        ({"a": {"scene": 0.5}}, "not \\[score, videos\\]"),
        ({"a": {"scene": []}}, "not \\[score, videos\\]"),
        ({"a": [1]}, "not a VBench result"),
    ],
)
def test_results_that_disagree_or_are_none_are_refused(tmp_path, files, said):
    """No file, two scores for a dimension and another layout are a sentence each, and so is half a file."""
    for name, content in files.items():
        write(tmp_path / f"{name}_eval_results.json", content)
    with pytest.raises(ValueError, match=said):
        vbench.read_results(tmp_path)
    (tmp_path / "cut_eval_results.json").write_text('{"scene": [0.5')
    for other in files:
        (tmp_path / f"{other}_eval_results.json").unlink()
    with pytest.raises(ValueError, match="is not JSON"):
        vbench.read_results(tmp_path)


# ---------------------------------------------------------------- the paper's tables


def test_the_papers_rows_add_up():
    """Every row has total = (4 quality + semantic) / 5 to within rounding, so none is mistyped; the paper's one
    misprint stays.
    """
    off = {
        (size, *row[:2]): row[2] - (4 * row[3] + row[4]) / 5
        for size, table in vbench.PAPER.items()
        for row in table
        if abs(row[2] - (4 * row[3] + row[4]) / 5) > 0.0101
    }
    assert off == {("1.3B", "DMD2-v", 4): pytest.approx(-0.2, abs=0.0101)} and [
        len(t) for t in vbench.PAPER.values()
    ] == [12, 9]


def test_compare_puts_the_own_row_at_its_nfe():
    """The row stands in bold after those of at least its NFE, in the table asked for or in both, and last without an
    NFE.
    """
    scores = vbench.aggregate(FULL)
    table = vbench.compare(scores, "ours", 1.5, "1.3b").splitlines()
    at = table.index("| **ours** | **1.5** | **100.00** | **100.00** | **100.00** |")
    assert table[at - 1].startswith("| TMD N4H5 | 1.5 | 83.79 |") and table[at + 1].startswith("| TMD N2H5 | 1.17 |")
    assert table[4] == "| Wan2.1, 50 steps, guided | 100 | 84.26 | 85.30 | 80.09 |" and len(table) == 4 + 12 + 1
    both = vbench.compare(scores, "ours")
    assert both.count("**ours** | **–**") == 2 and both.rstrip().endswith("**100.00** |") and "Wan2.1 14B" in both
    with pytest.raises(ValueError, match=r"1.3B and 14B"):
        vbench.compare(scores, size="5B")


# ---------------------------------------------------------------- cheap scores of one clip


def noise(seed=0, frames=6, side=32):
    return torch.rand(frames, side, side, 3, generator=torch.Generator().manual_seed(seed))


def test_a_still_clip_has_no_motion_and_no_flicker():
    """The same frame again and again: flickering exactly 1, motion exactly 0, all pairs still."""
    scores = cheap.score_clip(noise()[:1].repeat(5, 1, 1, 1))
    assert (scores["temporal_flickering"], scores["motion"], scores["still"]) == (1.0, 0.0, 1.0)


def test_flickering_is_vbenchs_formula_on_8_bit_frames():
    """(255 - mean over pairs of the mean absolute difference) / 255, computed in numpy on the 0 to 255 integers."""
    frames = np.random.default_rng(0).integers(0, 256, (7, 12, 20, 3), dtype=np.uint8)
    pairs = [np.abs(a.astype(np.float64) - b).mean() for a, b in zip(frames[1:], frames[:-1])]
    scores = cheap.score_clip(torch.from_numpy(frames).float() / 255)
    assert scores["temporal_flickering"] == pytest.approx((255 - np.mean(pairs)) / 255, abs=1e-6)


def test_noise_moves_by_a_third():
    """Independent uniform values differ by 1/3 on average, no pair is still, and 2 % of values lie at the ends (5 of
    255 levels).
    """
    scores = cheap.score_clip(noise(frames=12, side=64))
    assert scores["motion"] == pytest.approx(1 / 3, abs=0.003) and scores["temporal_flickering"] == pytest.approx(
        2 / 3, abs=0.003
    )
    assert scores["still"] == 0 and scores["clipped"] == pytest.approx(5 / 255, abs=0.002)


def test_a_jump_counts_once():
    """Four still pairs and one jump of 0.5: motion 0.1, four fifths of pairs still."""
    clip = torch.full((6, 4, 4, 3), 0.25)
    clip[3:] = 0.75
    scores = cheap.score_clip(clip)
    assert scores["motion"] == pytest.approx(0.1) and scores["still"] == pytest.approx(0.8)


def test_saturated_clips_are_clipped_and_colourful():
    """Black and white are clipped and grey; mid grey is neither; pure red has the colourfulness of the formula, 0.3 *
    255 * sqrt(5/4).
    """
    grey, white, red = torch.full((3, 8, 8, 3), 0.5), torch.ones(3, 8, 8, 3), torch.zeros(3, 8, 8, 3)
    red[..., 0] = 1
    grey, white, red = map(cheap.score_clip, (grey, white, red))
    assert (grey["clipped"], white["clipped"], red["clipped"]) == (0, 1, 1)
    assert grey["colourfulness"] == white["colourfulness"] == 0
    assert red["colourfulness"] == pytest.approx(0.3 * 255 * math.sqrt(1.25))
    halves = torch.zeros(2, 4, 4, 3)
    halves[:, :2, :, 0], halves[:, 2:, :, 2] = 1, 1  # red over blue: rg = 255 or 0, yb = 127.5 or -255
    assert cheap.score_clip(halves)["colourfulness"] == pytest.approx(
        math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, 63.75)
    )


def test_raising_the_contrast_raises_saturation():
    """A clip pushed away from grey is clipped more and more colourful, so the scores follow over-saturation."""
    mild = 0.5 + 0.6 * (noise() - 0.5)
    strong = (0.5 + 2 * (mild - 0.5)).clamp(0, 1)
    mild, strong = cheap.score_clip(mild), cheap.score_clip(strong)
    assert mild["clipped"] == 0 < 0.1 < strong["clipped"] and strong["colourfulness"] > 1.4 * mild["colourfulness"]


def test_every_score_is_explained():
    """MEANING has an entry for each score that is reported, and for no other."""
    assert set(cheap.MEANING) == {*cheap.score_clip(noise()), "diversity"}


@pytest.mark.parametrize(
    "bad",
    [
        noise() * 255,
        noise() - 0.5,
        noise() * math.nan,
        noise()[..., :1],
        noise()[0],
        noise().byte(),
        noise()[:, :0],
    ],
)
def test_what_is_no_clip_is_refused(bad):
    """Other ranges, NaN, other shapes and integers are one sentence."""
    with pytest.raises(ValueError, match="a clip"):
        cheap.score_clip(bad)
    with pytest.raises(ValueError, match="a clip"):
        cheap.diversity([bad])


# ---------------------------------------------------------------- diversity


def test_the_same_clip_twice_has_no_diversity():
    """Copies have distance exactly 0, one clip has none, and one other among copies has some."""
    clip = noise()
    assert (
        cheap.diversity([clip, clip.clone(), clip.clone()]) == 0.0
        and cheap.diversity([clip]) is None
        and cheap.diversity([]) is None
    )
    assert cheap.diversity([clip, clip, noise(1)]) > 0.1


def test_diversity_is_the_rms_of_all_pairs():
    """The one-pass value equals the loop over pairs, for clips from a generator too."""
    clips = [noise(seed) ** (seed + 1) for seed in range(5)]
    pairs = [(a - b).double().square().mean().item() for a, b in combinations(clips, 2)]
    assert cheap.diversity(clip for clip in clips) == pytest.approx(math.sqrt(sum(pairs) / len(pairs)), rel=1e-5)
    assert cheap.diversity([torch.zeros(2, 4, 4, 3), torch.full((2, 4, 4, 3), 0.5)]) == pytest.approx(0.5)


def test_clips_of_two_sizes_have_no_distance():
    """Seeds of one prompt at two sizes are refused."""
    with pytest.raises(ValueError, match="no distance"):
        cheap.diversity([noise(), noise(side=16)])


# ---------------------------------------------------------------- folders of mp4


def save(path, video):
    import imageio.v2 as imageio

    imageio.mimwrite(path, (video * 255).round().byte().numpy(), format="ffmpeg", fps=8, quality=9, macro_block_size=1)


def smooth(seed, frames=9):
    """A clip that codes well: one colour a quadrant, moving in brightness."""
    g = torch.Generator().manual_seed(seed)
    patch = 0.2 + 0.6 * torch.rand(1, 2, 2, 3, generator=g)
    return (patch * torch.linspace(1, 0.7, frames).view(-1, 1, 1, 1)).repeat_interleave(16, 1).repeat_interleave(16, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of one prompt, the same clip twice of another, one clip of a third whose name looks like a protocol and
    an index.
    """
    path = tmp_path_factory.mktemp("clips")
    for name, seed in (
        ("a red ball-0", 0),
        ("a red ball-10", 1),
        ("a cat, frozen-0", 2),
        ("a cat, frozen-1", 2),
        ("file: take-2-0", 3),
    ):
        save(path / f"{name}.mp4", smooth(seed) if "frozen" not in name else smooth(seed)[:1].repeat(9, 1, 1, 1))
    (path / "notes.txt").write_text("not a clip")
    return path


def test_mp4s_come_back_with_all_frames(folder, monkeypatch):
    """Decoding gives the frames that were written, within the loss of the codec."""
    video = cheap.read_video(folder / "a red ball-0.mp4")
    assert video.shape == (9, 32, 32, 3) and video.dtype == torch.float32
    assert (video - smooth(0)).abs().mean() < 0.02
    monkeypatch.chdir(folder)
    assert cheap.read_video("file: take-2-0.mp4").shape == video.shape


def test_a_folder_is_scored_by_prompt(folder):
    """Every clip is scored, seeds of a prompt are compared with each other alone, means are over prompts, and the
    result is JSON.
    """
    scores = cheap.score_folder(folder)
    json.dumps(scores, allow_nan=False)
    assert len(scores["videos"]) == 5 and set(scores["prompts"]) == {"a red ball", "a cat, frozen", "file: take-2"}
    ball, cat, take = (scores["prompts"][p] for p in ("a red ball", "a cat, frozen", "file: take-2"))
    expected = cheap.diversity([smooth(0), smooth(1)])
    assert ball["samples"] == 2 and ball["diversity"] == pytest.approx(expected, abs=0.02)
    assert cat["diversity"] == 0 and take == {"samples": 1, "diversity": None}
    assert scores["videos"]["a cat, frozen-0.mp4"]["still"] == 1 > scores["videos"]["a red ball-0.mp4"]["still"]
    motion = lambda prompt: np.mean([v["motion"] for name, v in scores["videos"].items() if name.startswith(prompt)])
    assert scores["mean"]["motion"] == pytest.approx(np.mean([motion(p) for p in scores["prompts"]]))
    assert scores["mean"]["diversity"] == pytest.approx(ball["diversity"] / 2) and set(scores["mean"]) == set(
        cheap.MEANING
    )


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "front"])
def test_a_broken_mp4_is_one_sentence(folder, tmp_path, damage):
    """Text, nothing, half a file, and a file whose index survives but whose frames are cut off: RuntimeError names the
    file.
    """
    whole, path = (folder / "a red ball-0.mp4").read_bytes(), tmp_path / "a-0.mp4"
    if damage == "front":  # the index first, as for streaming: a cut file then opens without complaint
        import subprocess

        from imageio_ffmpeg import get_ffmpeg_exe

        save(tmp_path / "long.mp4", noise(frames=40))
        line = [
            get_ffmpeg_exe(),
            "-v",
            "error",
            "-i",
            tmp_path / "long.mp4",
            "-c",
            "copy",
            "-movflags",
            "+faststart",
            path,
        ]
        subprocess.run(line, check=True)
        assert len(cheap.read_video(path)) == 40
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes({"text": b"not a video", "empty": b"", "cut": whole[: len(whole) // 2]}[damage])
    (tmp_path / "long.mp4").unlink(missing_ok=True)
    with pytest.raises(RuntimeError, match=r"a-0\.mp4 (is not a readable video|decodes to \d+ frames of 40)") as error:
        cheap.score_folder(tmp_path)
    assert "\n" not in str(error.value) and str(error.value).endswith("sample it again.")


def test_a_folder_without_clips_or_with_other_names_is_refused(tmp_path):
    """No mp4, and an mp4 without an index, are a sentence each."""
    with pytest.raises(ValueError, match="holds no mp4"):
        cheap.score_folder(tmp_path)
    (tmp_path / "grid.mp4").touch()
    with pytest.raises(ValueError, match=r"grid\.mp4 is not named prompt-index"):
        cheap.score_folder(tmp_path)
