"""``mixbits``: find the command, run it, turn errors into one clear message."""

from __future__ import annotations

import errno
import importlib
import os
import sys

import mixbits

# name -> what it does. Each is a module of this package with `main(arguments)`, imported when it is called:
# `mixbits run` works without torch.
COMMANDS = {
    "fit": "from a trained network and a budget to a packed model and its report",
    "compare": "methods x budgets x seeds from one start: what pays, and what is established",
    "sweep": "one method over many budgets: a front of accuracy against cost",
    "demo": "fit on embedded data, in under three minutes",
    "profile": "list a network's sites, layers and costs, and time its layers",
    "learn": "only learn the widths: policy.json",
    "finetune": "only train at the widths of a policy",
    "lower": "only pack the trained network: model.mixbits",
    "run": "run a packed model on data, without torch",
    "export": "write a packed model as ONNX or QONNX, or its widths for torchao",
    "push": "share a finished run on the Hugging Face Hub, with a card of its figures",
    "pull": "fetch a shared model, checked before it is used",
    "bench": "time every kernel beside the ceiling of its instructions",
    "report": "write the page of a run, a comparison or a sweep",
    "methods": "list the methods that learn widths",
}
USAGE_ERROR = 2
INTERRUPTED = 130  # what shells expect after Ctrl-C


def usage() -> str:
    """What ``mixbits --help`` prints."""
    rows = "\n".join(f"  {name:<10} {words}" for name, words in COMMANDS.items())
    return (
        "usage: mixbits COMMAND [options]\n\n"
        "Learns how many bits each tensor of a network deserves, within a budget, and packs the result.\n\n"
        f"commands:\n{rows}\n\n"
        "`mixbits COMMAND --help` lists a command's options. A first run: `mixbits demo --out runs/demo`.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for errors the user can mend, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        sys.stdout.write(f"mixbits {mixbits.__version__}\n")
        return 0
    if command not in COMMANDS:
        sys.stderr.write(f"mixbits: unknown command {command!r}; known are {', '.join(COMMANDS)}\n")
        return USAGE_ERROR
    return run_command(command, rest)


def run_command(command: str, arguments: list[str]) -> int:
    """The exit code of a command; errors that the user can mend become one message."""
    try:
        importlib.import_module(f"mixbits.cli.{command}").main(arguments)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"\nmixbits {command}: stopped. {interrupt}\n")
        return INTERRUPTED
    except BrokenPipeError:
        pass  # the reader of our output has left
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("MIXBITS_TRACEBACK"):
            raise
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        remedy = ". Free some disk space; a run goes on with --resume." if full else ""
        sys.stderr.write(f"mixbits {command}: error: {error}{remedy}\n")
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
