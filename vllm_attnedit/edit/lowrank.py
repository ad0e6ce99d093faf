"""Low-rank factors of a linear map, for inputs with a known second moment, around an RMSNorm.

A map ``W`` (rows x inputs) whose inputs have the second moment ``M = E[x x^T]`` is best
approximated at rank R, in mean squared output error, by ``U U^T W``, where ``U`` are the R leading
eigenvectors of ``W M W^T``: a principal component analysis of the outputs (Eckart-Young under a
data norm, as in ASVD, SVD-LLM and TransMLA). ``U^T W`` makes the latent, ``U`` expands it.

An RMSNorm stands between the two factors, and divides each token's latent by its own length. To
leave the product intact the latent has to have the same length for every token:

* latents are whitened (unit second moment each), so that many small contributions average out;
* one latent carries a constant larger than the others together, so that the length hardly depends
  on the token. The constant is the bias where there is one. Elsewhere it is the linear function of
  the input that is nearest to 1 on average, ``x^T M^-1 E[x]``: the normed inputs of trained models
  have a mean so large that this varies by a few percent, attention sinks included. How much larger
  the constant is follows from how constant it is.

The factors are then balanced, for training: AdamW moves every entry of ``expand`` by the learning
rate, so that each step changes the product by as much as the latents are long. White latents are
all too long but the strongest, the constant some 100 times, and training undid such a start within
100 steps. So each latent gets the length of what it brings: the columns of ``expand`` are made
equal, and the norm's weights (or ``reduce``, where no norm follows) take what they had. The
constant, which nothing expands yet, becomes as long as the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_CONSTANT_GAIN = 64.0
"""Length of a true constant over that of all other latents: they move the norm by 1 / gain^2."""
_LATENT_VARIANCE = 0.25
"""Relative variance of the mean square of white latents from token to token, as seen in trained
models; independent Gaussian ones would have 2 / rank."""
_RIDGE = 1e-6
_FLOOR = 1e-5
"""Smallest standard deviation of a latent, relative to the largest, that is scaled up to one."""


@dataclass(frozen=True)
class SecondMoment:
    """What is known of a layer's normed input ``x``; a 1 is appended if projections have biases.

    Attributes:
        matrix: ``E[x x^T]`` (I, I), float64.
        mean: ``E[x]`` (I,); ``None`` if it is not known.
        has_one: whether the last input is the constant 1.
    """

    matrix: Tensor
    mean: Tensor | None
    has_one: bool

    def regular(self) -> Tensor:
        """The matrix with a small ridge, invertible."""
        ridge = _RIDGE * self.matrix.diagonal().mean()
        return self.matrix + ridge * torch.eye(len(self.matrix), dtype=torch.float64)

    def energy(self, rows: Tensor) -> float:
        """``E |rows @ x|^2`` for rows (..., I)."""
        flat = rows.flatten(0, -2)
        return float(((flat @ self.matrix) * flat).sum())

    def constant(self) -> Tensor | None:
        """The linear function (I,) nearest to 1 on average, or ``None`` if nothing suggests one."""
        if self.has_one:
            one = torch.zeros(len(self.matrix), dtype=torch.float64)
            one[-1] = 1.0
            return one
        if self.mean is None:
            return None
        direction = torch.linalg.solve(self.regular(), self.mean)
        return direction / (direction @ self.mean)


@dataclass(frozen=True)
class Factors:
    """``rows ~ expand @ (norm_weight * rmsnorm(reduce @ x))``.

    Attributes:
        reduce: (R, I), what makes the latent.
        expand: (rows, R).
        length: of the latent from token to token, root mean square of its elements.
        constant_length: of the last element, if that is the constant, else 1.
        scale: (R,), of the elements behind the norm.
    """

    reduce: Tensor
    expand: Tensor
    length: float
    constant_length: float
    scale: Tensor

    @property
    def norm_weight(self) -> Tensor:
        """(R,), the weight with which the norm is ``scale`` on average."""
        return self.length * self.scale

    @property
    def plain_reduce(self) -> Tensor:
        """(R, I), what makes the latent where no norm follows."""
        return self.scale[:, None] * self.reduce

    def balanced(self, expand: Tensor | None = None) -> Factors:
        """The same map with all columns of ``expand`` equally long.

        Args:
            expand: (any rows, R), in its place.
        """
        expand = self.expand if expand is None else expand
        columns = expand.square().mean(0).sqrt()
        typical = columns.square().mean().sqrt()
        scale = torch.where(columns > 0, columns / typical, 1 / self.constant_length)
        return replace(self, expand=expand / scale, scale=scale)


def factorise(rows: Tensor, moment: SecondMoment, rank: int) -> Factors:
    """Factors of ``rows`` (N, I) at ``rank``, float64; ranks beyond N or I are zeros."""
    constant = moment.constant() if rank > 1 else None
    kept = min(rank - (constant is not None), *rows.shape)
    variance, vectors = torch.linalg.eigh(rows @ moment.matrix @ rows.T)
    vectors = vectors[:, -kept:].flip(1)  # (N, kept), strongest first
    deviation = variance[-kept:].flip(0).clamp_min(0).sqrt()
    scale = deviation.clamp_min(_FLOOR * max(float(deviation[0]), 1e-30))

    reduce = torch.zeros(rank, rows.shape[1], dtype=torch.float64)
    expand = torch.zeros(rows.shape[0], rank, dtype=torch.float64)
    reduce[:kept] = (vectors.T @ rows) / scale[:, None]
    expand[:, :kept] = vectors * scale
    constant_length = 1.0
    if constant is not None:
        constant_length = constant_gain(constant, moment) * rank**0.5
        reduce[-1] = constant * constant_length
    length = max(moment.energy(reduce) / rank, 1e-30) ** 0.5
    return Factors(reduce, expand, length, constant_length, torch.ones_like(reduce[:, 0]))


def constant_gain(constant: Tensor, moment: SecondMoment) -> float:
    """Length of the constant latent, relative to the others, that steadies the norm the most.

    With ``t`` the squared gain, ``v`` the constant's relative variance (its square's is 4v) and
    ``s`` that of the other latents' mean square, the squared norm has the relative variance
    ``(4 v t^2 + s) / (t + 1)^2``, least at ``t = s / 4v``.
    """
    square = moment.energy(constant[None])
    average = 1.0 if moment.has_one or moment.mean is None else float(constant @ moment.mean)
    variance = max(square / average**2 - 1.0, 0.0)
    return min(MAX_CONSTANT_GAIN, (_LATENT_VARIANCE / max(4 * variance, 1e-12)) ** 0.5)


def weighting(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a metric (D, D) and its inverse, for measuring errors under that metric.

    Directions that the metric hardly sees are kept at a thousandth of the strongest, which bounds
    what a large error in them may do on inputs unlike those it was taken from.
    """
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(1e-6 * max(float(values[-1]), 1e-30)).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
