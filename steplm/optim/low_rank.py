"""AdamW whose moments of the layers' matrices are those of a projected gradient: GaLore, APOLLO and APOLLO-Mini."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from steplm.errors import ConfigError
from steplm.cost.formats import is_low_rank
from steplm.cost.measure import ADAPTER_TENSORS
from steplm.optim.adamw import MOMENTS, AdamW, Piece, decays
from steplm.optim.projection import leading_vectors, random_projector
from steplm.optim.quantized import round_stochastically_
from steplm.rows import on_this_rank

SCALES = {"galore": 0.25, "apollo": 1.0, "apollo_mini": math.sqrt(128)}  # each method, and its paper's default
MAX_NORM_GROWTH = 1.01  # of APOLLO's update, from one step to the next


def has_low_rank_states(
    name: str,
    shape: tuple[int, ...],
    layer_prefix: str,
    rank: int,
    linears: Collection[str] | None = None,
    layers: Collection[int] | None = None,
) -> bool:
    """Whether a parameter is a matrix of a layer, no adapter's, with both sides longer than ``rank``.

    Args:
        layers: indices of the layers that count. None: every layer does.
        linears: names, below a layer, of its linear maps, ``self_attn.q_proj``: only their weights count. None: every
            matrix does.
    """
    if not name.startswith(f"{layer_prefix}.") or len(shape) != 2 or name.rpartition(".")[2] in ADAPTER_TENSORS:
        return False
    layer, _, rest = name.removeprefix(f"{layer_prefix}.").partition(".")
    counts = (layers is None or int(layer) in layers) and (linears is None or rest.removesuffix(".weight") in linears)
    return counts and is_low_rank(*shape, rank)


class LowRankAdamW(AdamW):
    """AdamW that keeps the moments of a layer's matrix for a projection of its gradient to ``rank`` rows.

    The gradient G, of a tall matrix its transpose, is projected along its smaller side, R = Pᵀ G; Adam makes N of R,
    with the bias corrected. Every ``update_proj_gap`` steps of the matrix P is renewed, and the moments are kept.
    Weight decay is decoupled. Then the weight loses the learning rate times

        galore       scale × P N; P are the gradient's leading singular vectors. arXiv 2403.03507, algorithm 2
        apollo       scale × G diag(s), s_j = ‖N_j‖ / ‖R_j‖ for each column, limited so that its norm grows by at most
                     1% a step; P is random, and made again at each step. arXiv 2412.05270, algorithm 1
        apollo_mini  the same of rank 1, whatever ``rank`` is, with one s = ‖N‖ / ‖R‖

    All other parameters are updated as ``AdamW`` does: outside ``layers``, vectors, adapters, matrices with a side
    that is not longer than ``rank``.

    A gradient of GaLore's that is all zero has no leading directions: before the first projector the matrix takes no
    step, later the old projector stays. One with NaN or infinity is never decomposed either; between renewals it goes
    into states and weights, as with ``AdamW``, and the gradient norm tells. APOLLO's limit takes no notice of a step
    whose update is zero, from which it would never grow.

    States of such a matrix: ``exp_avg`` and ``exp_avg_sq``, fp32 of shape (rank, larger side); ``projector``, of shape
    (smaller side, rank), or ``update_norm``, a number; ``master``. Bytes: ``memory.formats.low_rank_state_bytes``, and
    of the workspace ``low_rank_step_bytes``: a matrix is updated as a whole.

    Args:
        method: a key of ``SCALES``.
        update_proj_gap: steps between two projectors.
        scale: factor of the update; None: the method's.
        seed: of APOLLO's projectors.
        layer_prefix: name of the list of layers, ``model.layers``.
        layers, linears: see ``has_low_rank_states``.
        betas, eps, weight_decay: as ``AdamW``'s.
        master_weights: as ``AdamW``'s; ``adamw``: of what ``AdamW`` updates, and of no matrix with low-rank states.

    Raises:
        ConfigError: an unknown method.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        *,
        method: str,
        rank: int,
        update_proj_gap: int = 200,
        scale: float | None = None,
        seed: int = 0,
        layer_prefix: str,
        layers: Collection[int] | None = None,
        linears: Collection[str] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        master_weights: bool | str = True,
    ) -> None:
        if method not in SCALES:
            raise ConfigError(f"no low-rank optimizer {method!r}. Known: {', '.join(SCALES)}.", method=method)
        named = dict(named_parameters)
        self.method, self.rank = method, 1 if method == "apollo_mini" else rank
        self.update_proj_gap, self.seed = update_proj_gap, seed
        self.scale = SCALES[method] if scale is None else scale
        self.low_rank = {
            name
            for name, parameter in named.items()
            if has_low_rank_states(name, tuple(parameter.shape), layer_prefix, self.rank, linears, layers)
        }
        self._low_rank_masters = master_weights is True
        super().__init__(named, betas=betas, eps=eps, weight_decay=weight_decay, master_weights=bool(master_weights))

    @torch.no_grad()
    def step(self, learning_rate: float, grad_scale: float = 1.0) -> None:
        super().step(learning_rate, grad_scale)
        for name in self.parameters:
            if name in self.low_rank and self.parameters[name].grad is not None:
                self._update_matrix(name, learning_rate, grad_scale)

    def _update_alone(self, name: str, learning_rate: float) -> None:
        if name in self.low_rank:
            self._update_matrix(name, learning_rate, 1.0)
        else:
            super()._update_alone(name, learning_rate)

    def _wants_master(self, name: str, master_weights: bool) -> bool:
        return self._low_rank_masters if name in self.low_rank else master_weights

    def _new_moments(self, name: str, weight: Tensor, *, quantized: bool) -> dict[str, Tensor]:
        if name not in self.low_rank:
            return super()._new_moments(name, weight, quantized=quantized)
        small, large = sorted(weight.shape)

        def zeros(*shape: int) -> Tensor:
            return weight.new_zeros(shape, dtype=torch.float32)

        moments = {moment: zeros(self.rank, large) for moment in MOMENTS}
        return moments | (
            {"projector": zeros(small, self.rank)} if self.method == "galore" else {"update_norm": zeros()}
        )

    def _cut(self, name: str, weight: Tensor) -> list[Piece]:
        return [] if name in self.low_rank else super()._cut(name, weight)

    def _update_matrix(self, name: str, learning_rate: float, grad_scale: float) -> None:
        """One update of one matrix with low-rank states."""
        parameter = self.parameters[name]
        assert parameter.grad is not None
        gradient = _wide(on_this_rank(parameter.grad))
        decay = 1.0 - learning_rate * (self.weight_decay if decays(parameter) else 0.0)
        if self.method != "galore":
            self._update_apollo(name, gradient, learning_rate, grad_scale, decay)
        elif self._renew_projector(name, gradient):
            self._update_galore(name, gradient, learning_rate, grad_scale, decay)
        else:
            return
        self.steps[name] += 1

    def _renew_projector(self, name: str, gradient: Tensor) -> bool:
        """Whether there is a projector, new if it is time for it."""
        if self.steps[name] % self.update_proj_gap:
            return True
        vectors = leading_vectors(gradient, self.rank)
        if vectors is not None:
            self._states[name]["projector"].copy_(vectors)
        return vectors is not None or self.steps[name] > 0

    def _update_galore(self, name: str, gradient: Tensor, rate: float, grad_scale: float, decay: float) -> None:
        projector = self._states[name]["projector"]
        projected = projector.T @ gradient.float()
        descent = self._descent(name, projected.mul_(grad_scale))
        del projected
        weight = self._read_weight(name)
        _wide(weight).addmm_(projector, descent, beta=decay, alpha=rate * self.scale)
        del descent
        self._write_weight(name, weight)

    def _update_apollo(self, name: str, gradient: Tensor, rate: float, grad_scale: float, decay: float) -> None:
        gradient = gradient.float()
        renewal = self.steps[name] // self.update_proj_gap
        projector = random_projector(len(gradient), self.rank, f"{self.seed}/{name}/{renewal}", gradient.device)
        projected = projector.T @ gradient
        del projector
        descent = self._descent(name, projected.mul_(grad_scale))
        columns = None if self.method == "apollo_mini" else 0
        length = torch.linalg.vector_norm(projected, dim=columns)
        factors = torch.linalg.vector_norm(descent, dim=columns).div_(length).masked_fill_(length == 0, 0.0)
        del projected, descent, length
        factors.mul_(grad_scale)
        factors.mul_(self._limit_growth(name, torch.linalg.vector_norm(gradient, dim=0).mul_(factors)))
        weight = self._read_weight(name)
        _wide(weight).mul_(decay).addcmul_(gradient, factors, value=-rate * self.scale)
        del gradient, factors
        self._write_weight(name, weight)

    def _descent(self, name: str, projected: Tensor) -> Tensor:
        """Adam's step for the projected gradient, at learning rate 1: what the formula makes of zeros."""
        descent = torch.zeros_like(projected)
        moments = {moment: [self._states[name][moment]] for moment in MOMENTS}
        self._kernel([descent], [projected], moments, [self.steps[name]], learning_rate=1.0, weight_decay=0.0)
        return descent

    def _limit_growth(self, name: str, column_norms: Tensor) -> Tensor:
        """The factor, at most 1, that an update with these columns is to be scaled by; its norm is remembered."""
        last = self._states[name]["update_norm"]
        norm = torch.linalg.vector_norm(column_norms)
        limit = torch.where(last > 0, (MAX_NORM_GROWTH * last / norm).clamp(max=1.0), 1.0)
        # From a norm of zero there would be no growth.
        last.copy_(torch.where(norm > 0, norm * limit, last))
        return limit

    def _read_weight(self, name: str) -> Tensor:
        """Fp32: the master weight, the weight itself if it is fp32, or else a copy."""
        return self._states[name].get("master", on_this_rank(self.parameters[name].detach())).float()

    def _write_weight(self, name: str, weight: Tensor) -> None:
        parameter = on_this_rank(self.parameters[name].detach())
        if "master" in self._states[name]:
            parameter.copy_(weight)
        elif parameter.dtype != torch.float32:
            parameter.copy_(round_stochastically_(weight))


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, with the smaller side first; a view."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
