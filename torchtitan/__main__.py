"""`python -m torchtitan` is the command `torchtitan`."""

from torchtitan.cli import run

if __name__ == "__main__":
    run()
