"""What the model gives, under the published names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class DepthEstimatorOutput(Mapping[str, Any]):
    """What the model gives, by attribute, by name or by position among what is not ``None``.

    Attributes
    ----------
    loss : Tensor or None
        Training loss.
    predicted_depth : Tensor [B, H, W], float32
        Canopy height [m].
    hidden_states : tuple of Tensor [B, N, C] or None
        Embedding and output of every block.
    attentions : tuple of Tensor [B, heads, N, N] or None
        Attention weights of every block.
    """

    loss: Tensor | None = None
    predicted_depth: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def __getitem__(self, key: Any) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def to_tuple(self) -> tuple[Any, ...]:
        """Return what is not ``None``, in order."""
        return tuple(self._present().values())

    def _present(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
