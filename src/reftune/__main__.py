"""`python -m reftune`: the command line, for launchers that start modules (`torchrun -m reftune train ...`)."""

from reftune.cli import main

if __name__ == "__main__":
    main()
