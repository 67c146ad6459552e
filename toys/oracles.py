"""Closed forms to hold the method against: exact teachers, exact transition-matching students, exact inner flows.

All of them fit the contract of tmd_minimal.py, so the algorithm runs on them unchanged. Times are (B,), states (B, d).
"""

from __future__ import annotations

import torch

from tmd_minimal import bcast


class GaussianMixture:
    """A Gaussian mixture x ~ sum_k w_k N(mu_k, sigma_k^2 I): exact velocity (Eq. 2), exact samples of the posterior."""

    def __init__(self, means, sigmas, weights=None, dtype=torch.float64):
        self.means, self.sigmas = torch.as_tensor(means, dtype=dtype), torch.as_tensor(sigmas, dtype=dtype)
        weights = [1 / len(self.means)] * len(self.means) if weights is None else weights
        self.weights = torch.as_tensor(weights, dtype=dtype)

    def sample(self, n: int, generator=None):
        """Draw x (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.sigmas[k, None] * noise

    def _components(self, x_t, t):
        t = bcast(t, x_t)[..., None]  # (B, 1, 1)
        var = (1 - t) ** 2 * self.sigmas[:, None] ** 2 + t**2  # (B, K, 1)
        centred = x_t[:, None] - (1 - t) * self.means  # (B, K, d)
        log_p = self.weights.log() - centred.square().sum(-1) / (2 * var[..., 0]) - x_t.shape[1] / 2 * var[..., 0].log()
        clean = self.means + (1 - t) * self.sigmas[:, None] ** 2 / var * centred  # E[x | x_t, k]
        return log_p.softmax(-1), clean, self.sigmas[:, None] * t / var.sqrt()  # responsibilities, means, stds

    def posterior_mean(self, x_t, t):
        """The mean of the data given x_t: E[x | x_t] (B, d)."""
        p, clean, _ = self._components(x_t, t)
        return (p[..., None] * clean).sum(1)

    def posterior_sample(self, x_t, t, generator=None):
        """A sample of the data given x_t: x ~ p(x | x_t) (B, d)."""
        p, clean, std = self._components(x_t, t)
        k = torch.multinomial(p, 1, generator=generator)[:, 0]
        rows = torch.arange(len(k))
        noise = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype)
        return clean[rows, k] + std[rows, k] * noise

    def __call__(self, x_t, t, c=None):
        """The exact teacher: E[x_1 - x | x_t] = (x_t - E[x | x_t]) / t, Eq. (2)."""
        return (x_t - self.posterior_mean(x_t, t)) / bcast(t, x_t)


class ExactStudent:
    """Perfect transition matching: with N = 1 the head returns a sample of p(y | x_t), y = x_1 - x = (x_t - x) / t."""

    def __init__(self, data: GaussianMixture, generator=None):
        self.data, self.generator = data, generator

    def features(self, x_t, t, c=None):
        return x_t, t

    def head(self, y_s, s, r, m):
        x_t, t = m
        return (x_t - self.data.posterior_sample(x_t, t, self.generator)) / bcast(t, x_t)


class GaussianInnerFlow:
    """The exact optimum of TM-MF for y ~ N(mean, sigma^2), in either reading of Eq. (14); m is ignored.

    The inner flow's path through y_s is Y(q) = (1-q) mean + k std(q), std(q)^2 = (1-q)^2 sigma^2 + q^2, so the
    average velocity over [r, s] is exact. As printed, u = y_1 - head, the optimal head is the mean of E[y | Y(q)]
    over q in [r, s].
    """

    def __init__(self, sigma: float, field: str = "consistent", mean=0.0):
        self.sigma, self.field, self.mean = sigma, field, mean

    def std(self, q):
        return ((1 - q) ** 2 * self.sigma**2 + q**2).sqrt()

    def average_velocity(self, y_s, s, r):
        """The exact average velocity u(y_s, s, r) (B, *D), Eq. (7); at r = s the velocity E[y_1 - y | y_s], Eq. (6)."""
        s, r = bcast(s, y_s), bcast(r, y_s)
        centred = y_s - (1 - s) * self.mean
        y_r = (1 - r) * self.mean + centred * self.std(r) / self.std(s)
        instant = -self.mean + centred * (s - (1 - s) * self.sigma**2) / self.std(s) ** 2
        return torch.where(s > r, (y_s - y_r) / (s - r).clamp_min(1e-12), instant)

    def features(self, x_t, t, c=None):
        return None

    def head(self, y_s, s, r, m=None):
        if self.field == "consistent":
            return y_s - bcast(s, y_s) * self.average_velocity(y_s, s, r)
        q = torch.linspace(0, 1, 401, dtype=y_s.dtype)[:, None] * (s - r) + r  # (401, B)
        centred = (y_s - (1 - bcast(s, y_s)) * self.mean) / bcast(self.std(s), y_s)
        # E[y | Y(q)] - mean, per unit of centred
        mean_weight = torch.trapezoid((1 - q) * self.sigma**2 / self.std(q), dx=1 / 400, dim=0)
        return self.mean + bcast(mean_weight, y_s) * centred
