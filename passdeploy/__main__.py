"""Entry point of `python -m passdeploy` and of `torchrun -m passdeploy`."""

from passdeploy.cli import main

if __name__ == "__main__":
    main()
