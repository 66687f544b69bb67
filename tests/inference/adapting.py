"""Adapters as peft saves them, with weights that change every response."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Path, path: Path, seed: int, **config: Any) -> Path:
    """A LoRA adapter of the model at `base`, with random values for all trained weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    record = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **config}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped: Any = get_peft_model(model, LoraConfig(**record))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(path)
    return path


def edit_config(adapter: Path, **changes: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return adapter
