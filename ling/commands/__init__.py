"""One small module per subcommand: `add_arguments(parser)` and `run(args) -> int`, imported when it is called.

Here are the arguments that several subcommands share.
"""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `CONFIG [a.b=c ...]`, which `load_config(args.config, args.overrides)` takes."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings in place of the file's")


def positive_int(text: str) -> int:
    """A whole number of at least 1, as an argument's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
