"""AdamW with moments of a low-rank projection of the gradient: GaLore, APOLLO and APOLLO-Mini."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from steplm.cost.formats import is_low_rank
from steplm.errors import ConfigError
from steplm.optim.adamw import MOMENTS, adamw_
from steplm.optim.base import NamedParameters, RuleBase
from steplm.optim.masters import new_master, read_weight, write_weight
from steplm.optim.projection import leading_vectors, random_projector
from steplm.rows import on_this_rank

SCALES = {"galore": 0.25, "apollo": 1.0, "apollo_mini": math.sqrt(128)}  # each method with its paper's default
MAX_NORM_GROWTH = 1.01  # of APOLLO's update, from one step to the next


class LowRankAdamW(RuleBase):
    """AdamW that keeps the moments of a matrix for a projection of its gradient to ``rank`` rows.

    The gradient G (transposed, for a tall matrix) is projected along its smaller side, R = Pᵀ G. Adam turns R into N,
    with bias correction. P is refreshed every ``update_proj_gap`` steps of the matrix; the moments are kept. Weight
    decay is decoupled. The learning rate times the following is then subtracted from the weight:

        galore       scale × P N; P holds the gradient's leading singular vectors. arXiv 2403.03507, algorithm 2
        apollo       scale × G diag(s), s_j = ‖N_j‖ / ‖R_j‖ for each column, limited so that its norm grows by at most
                     1% per step; P is random, and generated again at each step. arXiv 2412.05270, algorithm 1
        apollo_mini  the same with rank 1, whatever ``rank`` is, and a single s = ‖N‖ / ‖R‖

    In GaLore, an all-zero gradient has no leading directions: before the first projector exists, the matrix is not
    updated; later, the old projector stays. A gradient with NaN or infinity is never decomposed either. Between
    refreshes it enters states and weights, as with ``AdamW``, and shows in the gradient norm. APOLLO's limit ignores a
    step whose update is zero, because the norm could never grow from zero.

    States of such a matrix: ``exp_avg`` and ``exp_avg_sq``, fp32 of shape (rank, larger side); ``projector``, of shape
    (smaller side, rank), or ``update_norm``, a number; ``master``. A matrix is updated as a whole.
    ``low_rank_state_bytes`` gives the bytes of the states and ``low_rank_step_bytes`` those of the workspace, both in
    ``steplm.cost.formats``.

    Args:
        method: a key of ``SCALES``.
        update_proj_gap: steps between two projectors.
        scale: factor of the update; None: the method's default.
        seed: seed of APOLLO's projectors.
        named_parameters: matrices with both sides longer than ``rank``.
        betas, eps, weight_decay, master_weights: as in ``AdamW``.

    Raises:
        ConfigError: an unknown method, or a parameter that is not such a matrix.
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        method: str,
        rank: int,
        update_proj_gap: int = 200,
        scale: float | None = None,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        master_weights: bool | str = True,
    ) -> None:
        if method not in SCALES:
            raise ConfigError(f"no low-rank optimizer {method!r}. Known: {', '.join(SCALES)}.", method=method)
        super().__init__(weight_decay=weight_decay)
        self.method, self.rank = method, 1 if method == "apollo_mini" else rank
        self.update_proj_gap, self.seed = update_proj_gap, seed
        self.scale = SCALES[method] if scale is None else scale
        self.betas, self.eps, self.master_weights = betas, eps, master_weights
        self.set_parameters(named_parameters)

    def _new_states(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        weight = on_this_rank(parameter.detach())
        if weight.ndim != 2 or not is_low_rank(len(weight), weight.shape[1], self.rank):
            raise ConfigError(
                f"{self.method} has states of rank {self.rank}, and {name} has the shape {tuple(weight.shape)}: leave "
                "it to AdamW.",
                name=name,
            )
        small, large = sorted(weight.shape)

        def zeros(*shape: int) -> Tensor:
            return weight.new_zeros(shape, dtype=torch.float32)

        held = {moment: zeros(self.rank, large) for moment in MOMENTS}
        held |= {"projector": zeros(small, self.rank)} if self.method == "galore" else {"update_norm": zeros()}
        return held | new_master(weight, self.master_weights)

    def _update(self, names: list[str], learning_rate: float, grad_scale: float) -> None:
        update = self._update_galore if self.method == "galore" else self._update_apollo
        decay = 1.0 - learning_rate * self.weight_decay
        for name in names:
            gradient = self.parameters[name].grad
            assert gradient is not None
            update(name, _wide(on_this_rank(gradient)), learning_rate, grad_scale, decay)

    def _is_ready(self, name: str) -> bool:
        """Refresh the projector if it is due, and return whether there is one."""
        if self.method != "galore" or self.steps[name] % self.update_proj_gap:
            return True
        gradient = self.parameters[name].grad
        assert gradient is not None
        vectors = leading_vectors(_wide(on_this_rank(gradient)), self.rank)
        if vectors is not None:
            self._states[name]["projector"].copy_(vectors)
        return vectors is not None or self.steps[name] > 0

    def _update_galore(self, name: str, gradient: Tensor, rate: float, grad_scale: float, decay: float) -> None:
        projector = self._states[name]["projector"]
        projected = projector.T @ gradient.float()
        descent = self._descent(name, projected.mul_(grad_scale))
        del projected
        weight = on_this_rank(self.parameters[name].detach())
        value = read_weight(weight, self._states[name])
        _wide(value).addmm_(projector, descent, beta=decay, alpha=rate * self.scale)
        del descent
        write_weight(value, weight, self._states[name])

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
        weight = on_this_rank(self.parameters[name].detach())
        value = read_weight(weight, self._states[name])
        _wide(value).mul_(decay).addcmul_(gradient, factors, value=-rate * self.scale)
        del gradient, factors
        write_weight(value, weight, self._states[name])

    def _descent(self, name: str, projected: Tensor) -> Tensor:
        """Adam's step for the projected gradient: an update of zero weights at learning rate 1."""
        descent = torch.zeros_like(projected)
        moments = {moment: [self._states[name][moment]] for moment in MOMENTS}
        adamw_(
            [descent],
            [projected],
            moments,
            [self.steps[name]],
            betas=self.betas,
            eps=self.eps,
            learning_rate=1.0,
            weight_decay=0.0,
        )
        return descent

    def _limit_growth(self, name: str, column_norms: Tensor) -> Tensor:
        """The factor, at most 1, that limits the norm of an update with these columns; stores the limited norm."""
        last = self._states[name]["update_norm"]
        norm = torch.linalg.vector_norm(column_norms)
        limit = torch.where(last > 0, (MAX_NORM_GROWTH * last / norm).clamp(max=1.0), 1.0)
        # The limit could never grow from a stored norm of zero.
        last.copy_(torch.where(norm > 0, norm * limit, last))
        return limit


def _wide(matrix: Tensor) -> Tensor:
    """A view of the matrix, transposed if necessary so that the smaller side comes first."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
