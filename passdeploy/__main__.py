"""`python -m passdeploy`, which is what `torchrun -m passdeploy` starts."""

from passdeploy.cli import main

if __name__ == "__main__":
    main()
