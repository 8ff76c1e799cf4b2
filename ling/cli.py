"""The `ling` command: finds the subcommand, imports only its module, and turns wrong input into one line and code 2."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import warnings
from typing import NoReturn

from ling import __version__

# name -> (module with add_arguments(parser) and run(args) -> int, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("ling.commands.train", "train a model, or go on with a run"),
    "launch": ("ling.commands.launch", "start a run as a job: local, SLURM, or torchrun over ssh"),
    "preflight": ("ling.commands.preflight", "check a node, or all ranks together, before a run"),
    "status": ("ling.commands.status", "how a run is doing, from its files alone"),
    "plan": ("ling.commands.plan", "memory, time and cost of a run before it starts, and the layouts that fit"),
    "config": ("ling.commands.config", "show or check a config, list its keys"),
    "tokenizer": ("ling.commands.tokenizer", "train a tokenizer"),
    "data": ("ling.commands.data", "prepare, inspect, index and trace training data"),
    "eval": ("ling.commands.eval", "loss of a checkpoint on held-out data"),
    "checkpoint": ("ling.commands.checkpoint", "list, verify, prune and merge checkpoints"),
    "prove-resume": ("ling.commands.prove_resume", "prove that an interrupted run equals an uninterrupted one"),
    "generate": ("ling.commands.generate", "continue a text with a checkpoint"),
    "export": ("ling.commands.export", "a checkpoint to a Hugging Face model directory"),
    "import": ("ling.commands.import_hf", "a Hugging Face model directory to a checkpoint"),
    "activations": ("ling.commands.activations", "list, describe and plot the FFN activations"),
    "doctor": ("ling.commands.doctor", "what is installed, and what each operation will use"),
}
EXIT_CODES = (
    "exit codes: 0 done, 2 wrong input, 75 stopped early with a checkpoint saved, 130 interrupted, 1 other errors"
)


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as every other wrong input: in one line, with code 2."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{self.prog}: {message}; see `{self.prog} --help`")


def main(argv: list[str] | None = None) -> int:
    """Run `ling` with these arguments (default: the process's) and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _main(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader (such as `head`) has gone: keep Python from complaining again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return code


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"ling {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        _fail(f"unknown command {name!r}; {hint}")
    from ling.config.errors import UserError

    try:
        return _run(name, rest)
    except UserError as error:
        _fail(str(error))


def _run(name: str, argv: list[str]) -> int:
    module_name, summary = COMMANDS[name]
    # megatron-core warns at import of each optional package that is absent: `ling doctor` says what matters of that
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # torch renames collectives that megatron-core calls by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    module = importlib.import_module(module_name)
    parser = _Parser(prog=f"ling {name}", description=(module.__doc__ or summary).split("\n\n")[0], allow_abbrev=False)
    module.add_arguments(parser)
    args, extra = parser.parse_known_args(argv)
    # argparse stops collecting overrides at the first option; those after it are overrides too
    overrides = [word for word in extra if not word.startswith("-") and hasattr(args, "overrides")]
    unknown = [word for word in extra if word not in overrides]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    return module.run(args)


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ling COMMAND ...   (ling COMMAND --help for its arguments, ling --version)",
            "",
            "Pre-training of Ling-architecture language models on megatron-core.",
            "",
            "commands:",
            *rows,
            "",
            EXIT_CODES,
        ]
    )


def _fail(message: str) -> NoReturn:
    print(f"ling: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
