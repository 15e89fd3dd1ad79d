"""`hf-layerprune <verb>`: the library on the command line.

Every setting of a verb can stand in a YAML file (`--config`) or on the command line, which wins. A user's mistake is
one line on stderr and exit status 2; anything else keeps its traceback. Only the verb that runs is imported.
"""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path

from .. import __version__
from ..errors import LayerPruneError, first_line, is_out_of_memory

VERBS = {
    "compress": "compress", "parallelize": "parallelize", "generate": "generate", "score": "measure",
    "evaluate": "measure", "benchmark": "benchmark", "estimate": "estimate", "push": "push",
    "push-space": "push_space", "demo": "demo",
}  # fmt: skip
"""Verb to the module here that runs it."""
FORMER_NAMES = {"plan": "estimate"}
USAGE = """\
usage: hf-layerprune <verb> [--config recipe.yaml] [--setting value ...]

  compress     remove layers one by one, each chosen by measurement and healed by distillation
  parallelize  run layers in parallel (or leave some out) without training
  generate     write down a teacher's own answers, to heal on
  score        measure and plot the importance of every layer
  evaluate     measure a checkpoint, alone or against a teacher
  benchmark    measure speed and memory of one or more checkpoints, side by side
  estimate     estimate what a run needs before it starts: memory, disk, tokens, rough time
  push         put the student of a run on the Hub, with its report and a card
  push-space   make or update a Space on the Hub that compares students with their originals
  demo         compare original and compressed side by side, in the browser

hf-layerprune <verb> --help lists the settings of a verb, --version prints the version. --debug after a verb shows the
traceback of an error that is otherwise one line. Without --model those that need one work on the small English teacher
that comes with the package.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if argv[0] == "--version":
        sys.stdout.write(f"hf-layerprune {__version__}\n")
        return 0
    verb, rest = FORMER_NAMES.get(argv[0], argv[0]), [word for word in argv[1:] if word != "--debug"]
    if verb not in VERBS:
        sys.stderr.write(f"hf-layerprune: no verb {verb!r}; choose one of {', '.join(VERBS)}\n")
        return 2
    try:
        if {"-h", "--help"} & set(rest):
            from .parsing import parse

            parse(verb, ["--help"])
        module = import_module(f".{VERBS[verb]}", __name__)
        _quiet()
        getattr(module, verb.replace("-", "_"))(rest)
    except KeyboardInterrupt as stop:
        goes_on = str(stop) or ("what is done is kept, the same command goes on" if verb == "generate" else "")
        sys.stderr.write(f"hf-layerprune: stopped{'; ' if goes_on else ''}{goes_on}\n")
        return 130
    except Exception as error:
        line = _users_mistake(error)
        if line is None:
            raise
        if "--debug" in argv:
            traceback.print_exc()
        sys.stderr.write(f"hf-layerprune: {line}\n")
        return 2
    return 0


def _users_mistake(error: Exception) -> str | None:
    """The line about an error that a user can do something about; `None` for an error of ours."""
    if isinstance(error, LayerPruneError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:  # no permission, a folder that is a file
        ours = Path(__file__).parent.parent in Path(str(error.filename)).parents
        return None if ours else str(error)
    if isinstance(error, OSError) and error.errno is not None:  # a full disk
        return str(error)
    if is_out_of_memory(error):
        less = "give fewer rows at a time (batch_size), shorter ones (max_length), or a smaller model or dtype"
        return f"out of memory: {first_line(error)}; {less}"
    return None


def _quiet() -> None:
    """The table and the bar speak for the run; libraries only where something is wrong."""
    import datasets
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()
