"""`python -m torchtitan` is the command `torchtitan`."""

from torchtitan.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
