"""An exact ruler for clips of moving shapes: the valid clip nearest to a clip, and scores by the distance to it.

The renderer (moving_shapes.py) is known, so no network judges.

    clips, c, _ = World().draw(500, torch.Generator())
    Ruler(World()).score(clips, c)["total"]   # data: 0.99, after some 6 s on one core
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from toys.moving_shapes import FIRST, MOTIONS, SHAPES, World, checked, decode


def _fit(residual, p, steps):
    """Levenberg-Marquardt on many small problems at once, with finite differences.

    residual maps p (n, k) to (n, m) -> p of smaller |residual|^2, and that (n,).
    """
    r, damp = residual(p), torch.full_like(p[:, :1], 1e-2)
    nudges = 1e-3 * torch.eye(p.shape[1], device=p.device)
    for _ in range(steps):
        J = torch.stack([(residual(p + nudge) - r) / 1e-3 for nudge in nudges], 2)  # (n, m, k)
        A = J.mT @ J
        diagonal = A.diagonal(dim1=1, dim2=2)
        # an unused parameter has a zero column
        A = A + torch.diag_embed(damp * diagonal + 1e-6 * diagonal.amax(1, keepdim=True) + 1e-9)
        q = p - torch.linalg.solve(A, J.mT @ r[..., None])[..., 0]
        s = residual(q)
        better = s.square().sum(1, keepdim=True) < r.square().sum(1, keepdim=True)
        p, r, damp = torch.where(better, q, p), torch.where(better, s, r), torch.where(better, damp / 5, damp * 5)
    return p, r.square().sum(1)


# A search begins with 4096 paths of each motion, in 8 parts. With the best of all instead of the best of each part
# the fit misses 7 % of the bounces.
_BANK, _PARTS = 4096, 8
_CELLS = 32  # steps of the grid of places across the side: half a pixel at 16 x 16


class Ruler:
    """Scores for clips of a `World`: `score` gives the numbers, `nearest` the valid clip closest to each clip."""

    def __init__(self, world: World | None = None):
        self.world = world = world or World()
        self.grid = torch.cartesian_prod(*[torch.linspace(0, 1, _CELLS + 1)] * 2)  # (G, 2) places for the centre
        # uniform like the data, with fewer gaps than a draw
        u = torch.quasirandom.SobolEngine(5, scramble=True, seed=0).draw(_BANK)
        self.params = u.repeat(len(MOTIONS), 1)
        motion = FIRST[2] + torch.arange(len(MOTIONS)).repeat_interleave(_BANK)
        self.paths = world.trajectory(motion, self.params)  # (5 M, T, 2)
        cell = (self.paths * _CELLS).round().long()
        frame = len(self.grid) * torch.arange(world.frames)
        self.cells = cell[..., 0] * (_CELLS + 1) + cell[..., 1] + frame  # frame and place in one number
        cover = [world.cover(torch.full((len(self.grid),), i), self.grid[:, None]) for i in range(len(SHAPES))]
        self.cover = torch.cat(cover).flatten(1)  # (3 G, H W)
        laws = self.paths.view(len(MOTIONS), _BANK, world.frames, 2)
        self.least = self._amount(laws).amin(1)  # the smallest amount of motion under each law
        self.spread = self._features(laws).std(1)  # (5, 6)

    @staticmethod
    def _amount(path):  # mean distance travelled a frame
        return path.diff(dim=-2).norm(dim=-1).mean(-1)

    @staticmethod
    def _features(path):  # where, phase, direction and speed: the mean, the start seen from it, the first step
        mean = path.mean(-2)
        return torch.cat([mean, path[..., 0, :] - mean, path[..., 1, :] - path[..., 0, :]], -1)

    def _check(self, clips, c=None):
        shape = (1, self.world.frames, self.world.size, self.world.size)
        if clips.ndim != 5 or clips.shape[1:] != shape or not len(clips):
            told = f"clips of shape {tuple(clips.shape)} do not fit this world"
            raise ValueError(f"{told}; give (n, {', '.join(map(str, shape))}).")
        if not clips.isfinite().all():
            raise ValueError("some clips hold nan or inf; score finite clips only.")
        if c is not None and len(checked(c)) != len(clips):
            raise ValueError(f"{len(c)} prompts do not fit {len(clips)} clips; give one prompt a clip.")
        tables = {name: v.to(clips.device) for name, v in vars(self).items() if torch.is_tensor(v)}
        vars(self).update(tables)  # they follow the clips

    def _chunks(self, clips):  # of 64 clips of 8 x 16 x 16: memory stays bounded
        return clips.detach().float().split(max(1, 2**17 // clips[0].numel()))

    def _clips(self, c, params):  # the valid clips of prompts (n, 3) and params (n, 5)
        return self.world.render(c[:, 0], c[:, 1], self.world.trajectory(c[:, 2], params))

    def _search(self, x):
        """Squared error of clips x (n, 1, T, H, W) against every shape at every place, less |x + 1|^2.

        -> (T, G, 2, 3, n)
        """
        T, G = self.world.frames, len(self.grid)
        energy = self.cover.square().sum(1).view(3, G, 1)
        product = torch.einsum("kp,ntp->tkn", self.cover, x[:, 0].flatten(2) + 1).view(T, 3, G, -1)
        shades = (1.0, 2.0)  # over the background, -1
        error = torch.stack([a * a * energy - 2 * a * product for a in shades])  # (2, T, 3, G, n)
        return error.permute(1, 3, 0, 2, 4).contiguous()

    def _nearest(self, x, error):
        """The nearest valid clip over all prompts: prompt (n, 3), params (n, 5), squared error (n,)."""
        n = len(x)
        # every path with every shape: (5 M, 6 n)
        total = F.embedding_bag(self.cells, error.flatten(2).flatten(0, 1), mode="sum")
        best, which = (v.flatten(0, 1) for v in total.view(len(MOTIONS) * _PARTS, -1, 6, n).min(1))  # (240, n)
        # 12 starts a clip, numbered by part of the bank, then shade, then shape
        pick = best.topk(12, 0, largest=False).indices.T  # (n, 12)
        words = [pick % 6 // 3 + FIRST[0], pick % 3 + FIRST[1], pick // (6 * _PARTS) + FIRST[2]]
        prompt = torch.stack(words, -1)  # (n, 12, 3)
        p = self.params.view(len(MOTIONS) * _PARTS, -1, 5)[pick // 6, which.T.gather(1, pick)]  # (n, 12, 5)
        for steps in (3, 8):  # all a little, then the best 3 to the end
            c, y = prompt.flatten(0, 1), x.repeat_interleave(p.shape[1], 0)
            miss = lambda u, c=c, y=y: (self._clips(c, u) - y).flatten(1)
            u, e = _fit(miss, p.flatten(0, 1), steps)
            e, order = e.view(n, -1).topk(3, 1, largest=False)
            prompt, p = (v.gather(1, order[..., None].expand(-1, -1, v.shape[2])) for v in (prompt, u.view_as(p)))
        return prompt[:, 0], p[:, 0], e[:, 0]

    def _recover(self, x, error):
        """Follow the likeliest shape frame by frame, with no law: path (n, T, 2), and which frames show it (n, T)."""
        n, T = len(x), self.world.frames
        shape = error.amin(1).sum(0).flatten(0, 1).argmin(0)  # (n,) shade * 3 + shape, each frame at its own best place
        place = error.flatten(2, 3)[:, :, shape, torch.arange(n, device=x.device)].argmin(1).T  # (n, T)
        shape, frames = shape.repeat_interleave(T), x.transpose(1, 2).flatten(0, 1)[:, :, None]  # (n T, 1, 1, H, W)
        words = shape // 3 + FIRST[0], shape % 3 + FIRST[1]
        miss = lambda at: (self.world.render(*words, at[:, None]) - frames).flatten(1)
        path, e = _fit(miss, self.grid[place].flatten(0, 1), 4)
        # choice: a shape is seen where it explains a third of what stands out of the background
        # (pure noise: at most a fifth)
        seen = e < 2 / 3 * (frames + 1).flatten(1).square().sum(1)
        return path.view(n, T, 2), seen.view(n, T)

    def _obedience(self, path, motion):
        """How well a path obeys the asked law and moves as much as it asks, in [0, 1].

        exp(- rms distance, in sixteenths of the side, to the law's closest path) * its share of the least motion.
        """
        n, law = len(path), motion - FIRST[2]
        bank = self.paths.view(len(MOTIONS), -1, *path.shape[1:])[law]  # (n, M, T, 2)
        starts = (bank - path[:, None]).square().sum((2, 3)).topk(4, 1, largest=False).indices
        tokens, target = motion.repeat_interleave(4), path.repeat_interleave(4, 0)
        miss = lambda u: (self.world.trajectory(tokens, u) - target).flatten(1)
        _, e = _fit(miss, self.params[starts].flatten(0, 1), 10)
        agreement = (-16 * (e.view(n, 4).amin(1) / path.shape[1]).sqrt()).exp()
        amount = self._amount(path)
        moves, rests = amount / self.least[law].clamp_min(1e-9), 1 - amount / self.least[1:].amin()
        return agreement * torch.where(law == 0, rests, moves).clamp(0, 1)

    def _judge(self, x, c):  # clips and prompts of one chunk -> tensors, one row a clip
        error = self._search(x)
        prompt, params, miss = self._nearest(x, error)
        fit = self._clips(prompt, params)
        path, seen = self._recover(x, error)
        right, shown = (prompt == c).float(), seen.float().mean(1)
        scores = dict(zip(("right_shade", "right_shape", "right_motion"), right.T), semantic=right.prod(1), seen=shown)
        scores["quality"] = 1 - (miss / (fit + 1).flatten(1).square().sum(1)).sqrt().clamp_max(1)
        return scores | dict(motion=self._obedience(path, c[:, 2]) * shown, prompt=prompt, params=params, path=path)

    def diversity(self, clips, c):
        """{prompt: spread of place, phase and first step over that of data}: the mean of three shares of at most 1.

        A prompt needs 4 clips; ValueError if none has them.
        """
        features, out = self._features(clips["path"]), {}
        for prompt in c.unique(dim=0):
            rows = (c == prompt).all(1)
            if rows.sum() >= 4:
                f, real = features[rows], self.spread[prompt[2] - FIRST[2]].view(3, 2).norm(dim=1)
                away = (f - f.mean(0)) * clips["seen"][rows, None]  # where no shape is seen, no place was chosen
                spread = (away.square().sum(0) / (len(f) - 1)).view(3, 2).sum(1).sqrt()
                free = real > 0.01  # a still shape has a place only
                out[decode(prompt)] = (spread[free] / real[free]).clamp_max(1).mean().item()
        if not out:
            told = f"no prompt has 4 clips among these {len(c)}, so diversity cannot be judged"
            raise ValueError(f"{told}; score several clips a prompt.")
        return out

    @torch.no_grad()
    def nearest(self, clips):
        """The valid clip nearest to each of clips (n, 1, T, H, W): clips, prompts (n, 3), params (n, 5)."""
        self._check(clips)
        c, p = (torch.cat(v) for v in zip(*(self._nearest(x, self._search(x))[:2] for x in self._chunks(clips))))
        return self._clips(c, p), c, p

    @torch.no_grad()
    def score(self, clips: torch.Tensor, c: torch.Tensor) -> dict:
        """Judge clips (n, 1, T, H, W) against the prompts c (n, 3) asked for.

        Every score lies in [0, 1], data near 1; nothing is random.

        quality    1 - |x - x*| / |x* + 1|, at least 0; x* is the nearest valid clip of ANY prompt, -1 the background
        semantic   x* has the asked prompt (right_shade, right_shape, right_motion: one word each)
        motion     the shape, followed frame by frame, obeys the asked law and moves as much as it asks (`_obedience`)
        diversity  spread of mean place, start and first step within a prompt over that of data, at most 1 each; of
                   prompts with 4 clips or more. Small samples spread less: data get 0.92 at 5 clips a prompt, 0.97
                   at 17. COMPARE AT THE SAME NUMBER
        total      the mean of these four

        Returns the means as floats, "laws" {motion: the same} (diversity and total are nan for a law with under 4
        clips a prompt), "prompts" {prompt: diversity} and "clips", per-clip tensors that also hold the fitted prompt
        and params, path and seen share. ValueError for clips of another world, nan or inf, prompts with an empty
        word, or under 4 clips of every prompt.
        """
        self._check(clips, c)
        c, chunks = c.to(clips.device), self._chunks(clips)
        judged = [self._judge(x, part) for x, part in zip(chunks, c.split(len(chunks[0])))]
        each = {name: torch.cat([j[name] for j in judged]) for name in judged[0]}
        prompts = self.diversity(each, c)

        def means(rows, diversities):
            out = {name: v[rows].mean().item() for name, v in each.items() if v.ndim == 1}
            out["diversity"] = sum(diversities) / len(diversities) if diversities else math.nan
            out["total"] = (out["quality"] + out["semantic"] + out["motion"] + out["diversity"]) / 4
            return out

        laws = {}
        for i, name in enumerate(MOTIONS):
            rows = c[:, 2] == FIRST[2] + i
            if rows.any():
                laws[name] = means(rows, [d for prompt, d in prompts.items() if prompt.split()[2] == name])
        return {**means(slice(None), list(prompts.values())), "laws": laws, "prompts": prompts, "clips": each}
