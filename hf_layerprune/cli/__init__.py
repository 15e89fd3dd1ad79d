"""`hf-layerprune <verb>`: the library on the command line.

Every setting of a verb can be given in a YAML file (`--config`) or on the command line, which wins. A user's mistake
is one line on stderr and exit status 2; anything else keeps its traceback. Only the verb that runs is imported.
"""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import sys
import traceback
import warnings
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from .. import __version__
from ..errors import LayerPruneError, first_line, is_disk_full, is_out_of_memory

VERBS = {
    "compress": "remove layers one by one, each chosen by measurement and healed by distillation",
    "parallelize": "run layers in parallel (or leave some out) without training",
    "generate": "write a teacher's own answers, to heal on",
    "score": "measure and plot the importance of every layer",
    "evaluate": "measure a checkpoint, alone or against a teacher",
    "benchmark": "measure speed and memory of one or more checkpoints, side by side",
    "estimate": "estimate what a run needs before it starts: memory, disk, tokens, rough time",
    "export": "write a student as a GGUF file, for llama.cpp and Ollama",
    "push": "put the student of a run on the Hub, with its report and a card",
    "push-space": "make or update a Space on the Hub that compares students with their originals",
    "demo": "compare original and compressed side by side, in the browser",
}
"""Verb to what it does; a file here, and the function in it, have its name."""
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS)
"""Errors that need no name of a file to be the user's: a full disk, no permission. Those of a connection are not."""
NO_COMPILER = ("No working C++ compiler", "Failed to find C compiler")  # of torch.compile on a CPU, of Triton
USAGE = """\
usage: hf-layerprune <verb> [--config recipe.yaml] [--setting value ...]

{}

hf-layerprune <verb> --help lists the settings of a verb, --version prints the version. Add --debug to see the
traceback of an error. Without --model, verbs that need a model use the small English teacher that comes with the
package.
""".format("\n".join(f"  {verb:12} {text}" for verb, text in VERBS.items()))


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "--version"):
        sys.stdout.write(f"hf-layerprune {__version__}\n" if "--version" in argv else USAGE)
        return 0
    verb, rest = argv[0], [word for word in argv[1:] if word != "--debug"]
    if verb not in VERBS:
        sys.stderr.write(f"hf-layerprune: unknown verb {verb!r}; choose one of {', '.join(VERBS)}\n")
        return 2
    try:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a character that it cannot show
        _run(verb, rest)
    except KeyboardInterrupt as stop:
        how = str(stop) or ("what is done is kept; run the same command to continue" if verb == "generate" else "")
        sys.stderr.write(f"hf-layerprune: stopped{'; ' if how else ''}{how}\n")
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


def _run(verb: str, argv: list[str]) -> None:
    name, wants_help = verb.replace("-", "_"), {"-h", "--help", "--help-all"} & set(argv)
    is_first = "torch" not in sys.modules  # else what is garbage now would be kept too
    gc.disable()  # collecting garbage takes a third of the time of imports, and seconds when the process ends
    try:
        if wants_help:
            parser = import_module(".parsing", __name__).Parser(verb)
        else:
            module = import_module(f".{name}", __name__)
            _silence_libraries()
        if is_first:
            gc.freeze()
            atexit.register(_thaw)
    finally:
        gc.enable()
    if wants_help:
        sys.stdout.write(parser.help_text(everything="--help-all" in argv))
        return
    console = import_module("..progress", __name__).Console
    console.lost = None
    getattr(module, name)(argv)
    if console.lost is not None:
        raise LayerPruneError(f"stdout cannot be written: {console.lost.strerror}; what was saved is complete")


def _thaw() -> None:
    """Let what was imported be collected, where Triton is: it would report all that is not as leaked, in 30 lines."""
    if "triton" in sys.modules:
        gc.unfreeze()


def _users_mistake(error: Exception) -> str | None:
    """The line about an error that a user can do something about; `None` for a bug."""
    if isinstance(error, LayerPruneError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and (error.filename is not None or error.errno in OF_THE_DISK):
        name = error.filename2 or error.filename or "a file"  # of a copy or a move, where it goes
        ours = Path(__file__).parent.parent in Path(str(name)).parents and error.errno not in OF_THE_DISK
        return None if ours else f"{name} cannot be used: {error.strerror}"  # a file the package lacks is a bug
    if is_disk_full(error):  # what a library raises in place of the operating system's own
        return f"a file cannot be written: {first_line(error)}"
    if is_out_of_memory(error):
        advice = (
            "give fewer rows at a time (batch_size), shorter ones (max_length), or a smaller model or dtype; a run of "
            "compress keeps its rounds and resumes with --resume --gradient_checkpointing true"
        )
        return f"out of memory: {first_line(error)}; {advice}"
    if any(part in str(error) for part in NO_COMPILER):
        return f"{first_line(error)}; to compile layers install gcc and g++, or leave compilation out"
    return None


def _silence_libraries() -> None:
    """Let the table and the bar speak for the run, and libraries only where something is wrong."""
    import datasets
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)  # PEFT's to follow
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()
    logging.getLogger("trl.trainer.sft_trainer").addFilter(OncePerKind())


class OncePerKind(logging.Filter):
    """Let only the first of messages that begin alike through: TRL warns of every row whose prompt it has to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        before = len(self.seen)
        self.seen.add(record.getMessage()[:60])
        return len(self.seen) > before
