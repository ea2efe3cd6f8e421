"""What an update tells about itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RULE_KL = "rule_kl"
"""The KL that the rule of the learning rate is fed with, among the names of a row, where that is not the loss's."""

# what loss_dict calls them, in its order
_LOGGED = {"value_loss": "value", **{name: name for name in ("surrogate", "entropy", "rnd", "symmetry")}}
_LOGGED |= {name: name for name in ("kl", "clip_fraction", "approx_kl")}


class Run:
    """What one update collects: tensors on the device, in the order of the mini-batches."""

    def __init__(self, kl_coef: float | Tensor) -> None:
        """``kl_coef``: what the update begins with."""
        self.kl_coef: Any = kl_coef  # a 0-dim tensor if it adapts
        self._names: list[str] = []
        self.metrics: list[Tensor] = []  # a row for each mini-batch, as the names
        self.rule_kls: list[Tensor] = []  # what the rule for the learning rate was fed
        self.rates: list[Tensor] = []
        self.last_rate: Tensor | None = None
        self.stopped: Tensor | None = None
        self.skipped: list[Tensor] = []
        self.lost: list[Tensor] = []  # steps whose gradients were not finite
        self.lost_of_rnd: list[Tensor] = []

    def add(self, names: list[str], metrics: Tensor) -> None:
        """The metrics of a mini-batch, [number of names]: ``reference.METRICS`` and more, the same each time."""
        self._names = names
        self.metrics.append(metrics)

    def last_rule_kl(self) -> Tensor:
        """The KL for the rule of the learning rate at the last mini-batch. 0-dim."""
        name = RULE_KL if RULE_KL in self._names else "kl"
        return self.metrics[-1][self._names.index(name)]

    def last_kls(self, count: int) -> list[Tensor]:
        """The KL at each of the last mini-batches. 0-dim each."""
        return [row[self._names.index("kl")] for row in self.metrics[-count:]]

    def read(self, counts: dict[str, Tensor]) -> dict[str, float]:
        """Means over the update and more, and the rate at its end: the only time that the host waits for the device.

        ``counts``: 0-dim each, of the rollout before.
        """
        metrics = torch.stack(self.metrics).double()  # [mini-batches, metrics]
        kl = metrics[:, self._names.index("kl")]
        extra = {"first_kl": kl[0], "max_kl": kl.max(), "last_kl": kl[-1]}
        if self.rates:
            rates = torch.stack(self.rates)
            extra |= {"learning_rate_min": rates.min(), "learning_rate_max": rates.max()}
        if self.skipped:
            extra["skipped_steps"] = torch.stack(self.skipped).sum()
        if self.lost:
            extra["nonfinite_steps"] = torch.stack(self.lost).sum()
        if self.lost_of_rnd:
            extra["nonfinite_rnd_steps"] = torch.stack(self.lost_of_rnd).sum()
        extra |= counts
        if isinstance(self.kl_coef, Tensor):
            extra["kl_coef"] = self.kl_coef
        if self.last_rate is not None:
            extra["learning_rate"] = self.last_rate
        values = torch.cat([metrics.mean(0), torch.stack([t.double() for t in extra.values()])]).tolist()
        found = dict(zip([*self._names, *extra], values, strict=True))
        means = {key: found[name] for name, key in _LOGGED.items() if name in found}
        return means | {name: found[name] for name in extra}
