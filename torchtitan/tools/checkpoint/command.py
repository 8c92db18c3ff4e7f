"""`torchtitan checkpoint`: list, verify, prune and compare checkpoints."""

from __future__ import annotations

import argparse

from torchtitan.errors import ConfigError

from .diff import diff
from .listing import prune, show, verify


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments after `torchtitan checkpoint`; return the exit code.

    It is 0, or 1 if `verify` finds damage or `diff` a difference.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read or deleted.
        ConfigError: an unknown kind of URL, or a wrong number.
    """
    args = _parser().parse_args(argv)
    if args.action == "list":
        show(args.path)
    elif args.action == "verify":
        return verify(args.paths)
    elif args.action == "prune":
        if args.keep < 1:
            raise ConfigError(f"--keep {args.keep}: must be 1 or more")
        if args.keep_every < 0:
            raise ConfigError(f"--keep-every {args.keep_every}: must be 0 or more")
        prune(args.path, args.keep, args.keep_every, args.dry_run)
    else:
        return diff(args.first, args.second)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchtitan checkpoint",
        description="List, verify, prune and compare checkpoints. A PATH may be a URL.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list a run's checkpoints: step, time, size, state")
    listing.add_argument("path", metavar="PATH", help="a run's folder, or that of its checkpoints")

    verify = actions.add_parser("verify", help="read all files and compare their checksums")
    verify.add_argument(
        "paths", nargs="+", metavar="PATH", help="a checkpoint, or a folder of checkpoints"
    )

    prune = actions.add_parser("prune", help="delete all resumable checkpoints but the newest K")
    prune.add_argument("path", metavar="PATH", help="a run's folder, or that of its checkpoints")
    prune.add_argument("--keep", type=int, required=True, metavar="K", help="number to keep")
    prune.add_argument(
        "--keep-every", type=int, default=0, metavar="N", help="also keep those of every N steps"
    )
    prune.add_argument("--dry-run", action="store_true", help="only show what would be deleted")

    diff = actions.add_parser("diff", help="compare two checkpoints, or two HF folders")
    diff.add_argument("first", metavar="A", help="a step-N or a Hugging Face folder")
    diff.add_argument("second", metavar="B")
    return parser
