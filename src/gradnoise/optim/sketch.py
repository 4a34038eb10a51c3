r"""Streaming low-rank sketch of a covariance, and noise of that shape (Oja-EMA).

A covariance of d coordinates is held as U diag(S) U' + lam (I - U U'): r orthonormal directions U (d, r) with
their variances S (r,), and one variance lam for all others, the residual of probabilistic principal component
analysis. One update takes the second moment G = X'X/n of n rows, by way of G U alone (rho: the gain):

.. math:: U, R = \operatorname{qr}((1-\rho) U \operatorname{diag}(S) + \rho G U), \quad
          S = |\operatorname{diag} R|, \quad
          \operatorname{tr} \leftarrow \operatorname{tr} + \rho (\operatorname{tr} G - \operatorname{tr}),
          \quad \lambda = (\operatorname{tr} - \textstyle\sum S) / (d - r).

It costs O(n d r + d r^2), holds O(d r) numbers, and does not depend on the units of the rows. Nothing here
waits for the device, except where the rank adapts.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.base.streams import generator

Side = Literal["left", "right"]
Spectrum = Literal["aligned", "reversed", "random"]

# Directions that an adaptive sketch starts with, and adds or gives up at a time.
STEP = 4
# No direction gets less than this share of the mean variance, so that each can be reversed.
FLOOR = 1e-4
# How much of the old directions stays in the new ones, relative to the largest entry: where rows say nothing,
# the old ones stay, and rounding does not choose.
KEPT = 1e-6


class Sketch:
    r"""Covariance of `dimension`-vectors as U diag(S) U' + lam (I - U U'), followed over updates.

    `basis`: U (dimension, r), `sizes`: S (r,), largest first, `trace`: tr, all in squared units of the rows;
    r is the smaller of `rank` and `dimension`. `half_life`: of a row's weight, in updates; the first updates
    are a plain mean. `seed`, `name`: key of the draws, so that every process starts from the same U. `count`:
    updates made, `skipped`: updates left out because their numbers were not finite or came from no rows.

    `explained` below 1: `rank` is the most, and r adapts. `STEP` directions are added while sum S / tr is
    below `explained`, and given up when they are not needed for a quarter of the way from it to 1; either
    only after the last change had a half-life to show.

    `spectrum`: "aligned"; or a control: "reversed", variances proportional to 1/variance, or "random", the
    same variances along random directions. All have the same trace.

    Raises `InputError` for a size, half-life or share out of range, an unknown spectrum, and a dtype other
    than float32 and float64 (there is no QR in half precision; rows may have any floating dtype).
    """

    def __init__(
        self,
        dimension: int,
        rank: int,
        half_life: float,
        seed: int,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        explained: float = 1.0,
        spectrum: Spectrum = "aligned",
    ) -> None:
        if dimension < 1:
            raise InputError("dimension", dimension, "must be 1 or more")
        if rank < 1:
            raise InputError("rank", rank, "must be 1 or more")
        if not half_life > 0:
            raise InputError("half_life", half_life, "must be more than 0 updates")
        if not 0 < explained <= 1:
            raise InputError("explained", explained, "must be a share above 0, at most 1")
        if spectrum not in get_args(Spectrum):
            raise InputError("spectrum", spectrum, "must be aligned, reversed or random")
        if dtype not in (torch.float32, torch.float64):
            raise InputError("dtype", dtype, "must be float32 or float64: there is no QR in half precision")
        self.dimension, self.rank, self.half_life = dimension, min(rank, dimension), half_life
        self.seed, self.name, self.explained, self.spectrum = seed, name, explained, spectrum
        directions = min(self.rank, STEP) if explained < 1 else self.rank
        self.basis = torch.linalg.qr(self._drawn(directions, 0)).Q.to(device, dtype)
        self.sizes = self.basis.new_zeros(directions)
        self.trace = self.basis.new_zeros(())
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros_like(self.count)
        self._changed = 0
        # The last factors that were asked for: they hold from one update to the next.
        self._made: tuple[float, tuple[Tensor, Tensor, Tensor]] | None = None
        self._strangers = self.basis[:, :0]
        if spectrum == "random":
            self._strangers = torch.linalg.qr(self._drawn(self.rank, 1)).Q.to(self.basis)

    def _drawn(self, directions: int, *counters: int) -> Tensor:
        """(dimension, directions) standard normal numbers, in float64 so that every dtype starts alike."""
        draw = generator(self.seed, self.name, *counters)
        return torch.randn(self.dimension, directions, generator=draw, dtype=torch.float64)

    @torch.no_grad()
    def products(self, rows: Tensor, weight: float = 1.0, count: float | None = None) -> Tensor:
        r"""What `update` needs of rows X (n, dimension): w [X'X U, flattened | tr X'X] and `count`, in a row.

        (dimension r + 2,) numbers that add up, over calls and over processes, between two updates: the second
        moment is then G = sum of w X'X / sum of counts. `count`: what the rows add to the divisor, by default
        n. A covariance between groups without the part that comes from within them (ANOVA) is a sum of two:
        `products(centred means, count=groups - 1) + products(centred rows, weight=-c, count=0)`.

        Raises `InputError` for rows of another shape.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dimension:
            raise InputError("rows", tuple(rows.shape), f"must have the shape (n, {self.dimension})")
        with self._exact():
            rows = rows.to(self.basis)
            moment = weight * (rows.T @ (rows @ self.basis))
            square = weight * rows.square().sum()
        number = moment.new_tensor(len(rows) if count is None else count)
        return torch.cat([moment.flatten(), square.view(1), number.view(1)])

    @torch.no_grad()
    def update(self, products: Tensor) -> None:
        r"""Take in the (summed) products of rows.

        The gain is rho = max(1 - 2^(-1/half_life), 1/count). A second moment that is a difference can have
        negative eigenvalues, of which the magnitudes |diag R| know nothing: S_j gets the sign of u_j' K_j, K
        the matrix that QR is taken of, and what is below 0 becomes 0. Products that are not finite, or of no
        rows, change nothing but `skipped`.

        Raises `InputError` for products that were made with another number of directions.
        """
        if products.shape != (self.basis.numel() + 2,):
            mend = f"must have the shape ({self.basis.numel() + 2},): make them anew after each update"
            raise InputError("products", tuple(products.shape), mend)
        self._made = None
        products = products.to(self.basis)
        usable = products.isfinite().all() & (products[-1] > 0)
        products = torch.where(usable, products, torch.ones_like(products))
        moment, square = products[:-2].view_as(self.basis) / products[-1], products[-2] / products[-1]
        gain = (1 / (self.count + 1).to(self.basis)).clamp_min(1 - 2 ** (-1 / self.half_life))
        basis, sizes = self._turned((1 - gain) * self.basis * self.sizes + gain * moment)
        self.basis = torch.where(usable, basis, self.basis)
        self.sizes = torch.where(usable, sizes, self.sizes)
        self.trace = torch.where(usable, self.trace + gain * (square - self.trace), self.trace)
        self.count, self.skipped = self.count + usable, self.skipped + ~usable
        if self.explained < 1:
            self._fit_rank()

    def _turned(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Directions and variances from the image (dimension, r) of the basis under the covariance."""
        largest = image.abs().amax()
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        turned, upper = torch.linalg.qr(image / scale + KEPT * self.basis)
        sizes = scale * upper.diagonal().abs() * (self.basis * image).sum(0).sign()
        # QR lets later directions make room for earlier ones: strong ones go first.
        sizes, order = sizes.clamp_min(0).sort(descending=True, stable=True)
        return turned[:, order], sizes

    def _fit_rank(self) -> None:
        count = int(self.count)
        # Early on the memory is as long as the updates are many.
        if count < self._changed + min(self.half_life, self._changed) or not self.trace > 0:
            return
        shares = (self.sizes.cumsum(0) / self.trace).tolist()
        used = len(shares)
        if shares[-1] < self.explained and used < self.rank:
            fresh = self._drawn(min(STEP, self.rank - used), 2, count).to(self.basis)
            self.basis = torch.linalg.qr(torch.cat([self.basis, fresh], 1)).Q
            # With the variance that they had as unknown ones, the covariance stays as it is.
            rest = (self.trace - self.sizes.sum()).clamp_min(0) / (self.dimension - used)
            self.sizes = torch.cat([self.sizes, rest.expand(fresh.shape[1])])
        elif used > STEP and shares[-1 - STEP] > self.explained + (1 - self.explained) / 4:
            self.basis, self.sizes = self.basis[:, :-STEP].clone(), self.sizes[:-STEP].clone()
        else:
            return
        self._changed = count

    def share(self) -> Tensor:
        """Share of the trace that the directions capture, sum S / tr; nan before the first update.

        Above 1: the directions show more than there is, so part of it is sampling noise (see `factors`).
        """
        captured: Tensor = self.sizes.sum() / self.trace
        return captured

    @torch.no_grad()
    def factors(self, alignment: float) -> tuple[Tensor, Tensor, Tensor]:
        r"""U (dimension, r), e (r,) and f (): the covariance U diag(e) U' + f (I - U U'), trace = dimension.

        .. math:: k = d / (\textstyle\sum S + \lambda (d - r)), \quad e = a k S + (1 - a), \quad
                  f = a k \lambda + (1 - a)

        with a the `alignment`, from 0 (isotropic) to 1; S and lam count for at least `FLOOR` of their mean.
        Where sum S exceeds the trace, only tr of it is real and the rest is sampling noise, which says
        nothing about directions: a is then times tr / sum S. Isotropic where the trace is not above 0.

        Raises `InputError` for an alignment outside of [0, 1].
        """
        if not 0 <= alignment <= 1:
            raise InputError("alignment", alignment, "must be from 0 (isotropic) to 1")
        if self._made is None or self._made[0] != alignment:
            self._made = alignment, self._factors(alignment)
        return self._made[1]

    def _factors(self, alignment: float) -> tuple[Tensor, Tensor, Tensor]:
        others = self.dimension - len(self.sizes)
        rest = ((self.trace - self.sizes.sum()) / max(others, 1)).clamp_min(0)
        mean = (self.sizes.sum() + others * rest) / self.dimension
        rest = (rest / mean).clamp_min(FLOOR) if others else torch.full_like(mean, FLOOR)
        sizes = (self.sizes / mean).clamp_min(FLOOR)
        if self.spectrum == "reversed":
            # One that shows less than an unknown one is not known, and must not draw all of the noise.
            sizes, rest = 1 / torch.maximum(sizes, rest), 1 / rest
        gain = self.dimension / (sizes.sum() + others * rest)
        known = (self.trace > 0) & (mean > 0)
        sizes, rest = (torch.where(known, gain * part, torch.ones_like(part)) for part in (sizes, rest))
        basis = self._strangers[:, : len(sizes)] if self.spectrum == "random" else self.basis
        # Rounding alone may put the share above 1 by less than the floor.
        real = alignment * ((1 + FLOOR) / self.share()).clamp(0, 1).nan_to_num(1)
        return basis, real * sizes + (1 - real), real * rest + (1 - real)

    @torch.no_grad()
    def colour(self, z: Tensor, alignment: float, side: Side = "right") -> Tensor:
        r"""Give white noise the covariance `matrix(alignment)` along one of its dimensions.

        .. math:: \sqrt f z + (z U)(\sqrt e - \sqrt f) U'

        `z`: (dimension,), (..., o, dimension) for the right side or (..., dimension, i) for the left. Both
        sides, one after the other, give the Kronecker product. Computed in the sketch's precision or better,
        returned in that of `z`.

        Raises `InputError` for a side that does not exist or does not fit, and as `factors`.
        """
        if side not in get_args(Side):
            raise InputError("side", side, "must be left or right")
        across = side == "left" and z.ndim > 1
        if z.ndim < 1 or z.shape[-2 if across else -1] != self.dimension:
            raise InputError("z", tuple(z.shape), f"its {side} side must have {self.dimension} coordinates")
        basis, along, rest = (part.to(z.device) for part in self.factors(alignment))
        wide = torch.promote_types(z.dtype, basis.dtype)
        noise, basis, change = z.to(wide), basis.to(wide), (along.sqrt() - rest.sqrt()).to(wide)
        with self._exact():
            if across:
                shaped = basis @ (change[:, None] * (basis.T @ noise))
            else:
                shaped = ((noise @ basis) * change) @ basis.T
        return (rest.sqrt() * noise + shaped).to(z.dtype)

    def variances(self, alignment: float) -> Tensor:
        """(dimension,) diagonal of `matrix(alignment)`, with mean 1."""
        basis, along, rest = self.factors(alignment)
        return rest + (basis.square() * (along - rest)).sum(1)

    def matrix(self, alignment: float) -> Tensor:
        """(dimension, dimension) covariance that `colour` gives; for small dimensions."""
        basis, along, rest = self.factors(alignment)
        return rest * torch.eye(self.dimension).to(basis) + (basis * (along - rest)) @ basis.T

    def state_dict(self) -> dict[str, Any]:
        """All that updates have changed; later updates leave these tensors as they are."""
        tensors = {"basis": self.basis, "sizes": self.sizes, "trace": self.trace}
        return {**tensors, "count": int(self.count), "skipped": int(self.skipped), "changed": self._changed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a sketch that was made with the same arguments.

        Raises `InputError` for directions of another dimension or number.
        """
        shape = tuple(state["basis"].shape)
        fewest = 1 if self.explained < 1 else self.rank
        if shape[0] != self.dimension or not fewest <= shape[1] <= self.rank:
            mend = f"this sketch has {self.rank} directions of {self.dimension} coordinates"
            raise InputError("basis", shape, mend)
        self.basis, self.sizes, self.trace = (
            state[key].to(self.basis, copy=True) for key in ("basis", "sizes", "trace")
        )
        self.count, self.skipped = (torch.full_like(self.count, state[key]) for key in ("count", "skipped"))
        self._changed, self._made = state["changed"], None

    def _exact(self) -> torch.autocast:
        # Hooks run inside of the user's autocast, which would make the products half precision.
        return torch.autocast(self.basis.device.type, enabled=False)
