"""How close a model of the exact profile comes to the float model that it was made from: the report of `nexus model fidelity`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerFidelity:
    """`error`: of this part alone, both given what the float model has before it. |exact - float| / |float| of each token's output,
    as the root of the mean square over all tokens."""

    name: str
    error: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """`text`: the name of what was compared; `texts`, `windows`, `tokens`: how many. `source`: the directory that the float weights
    came from. `kernel`: what computed the exact layers. `layers`: "embedding", every layer, and "head" where there is one.

    Of a causal model, over every token that follows another: `top1_agreement`, how often both find the same token the likeliest;
    `perplexity_exact` and `perplexity_float`, of the text itself. Of an encoder, over all texts: cosine of the two vectors, and
    `overlap`, how many of the ten nearest other texts are the same. None where it does not apply.
    """

    text: str
    source: str
    texts: int
    windows: int
    tokens: int
    kernel: str
    layers: tuple[LayerFidelity, ...]
    top1_agreement: float | None = None
    perplexity_exact: float | None = None
    perplexity_float: float | None = None
    cosine_mean: float | None = None
    cosine_worst: float | None = None
    overlap: float | None = None

    @property
    def perplexity_ratio(self) -> float | None:
        if self.perplexity_exact is None or not self.perplexity_float:
            return None
        return self.perplexity_exact / self.perplexity_float

    @property
    def worst_layer(self) -> LayerFidelity:
        return max(self.layers, key=lambda layer: layer.error)
