"""`python -m torchtitan` is the command `torchtitan`."""

from torchtitan.cli import leave, main

if __name__ == "__main__":
    leave(main())
