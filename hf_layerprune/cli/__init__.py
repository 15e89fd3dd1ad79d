"""`hf-layerprune <verb>`: the library on the command line.

Every setting of a verb can stand in a YAML file (`--config`) or on the command line, which wins. A user's mistake is
one line on stderr and exit status 2.
"""

from __future__ import annotations

import sys

VERBS = (
    "compress", "parallelize", "generate", "score", "evaluate", "benchmark", "plan", "convert", "push", "push-space",
    "demo",
)  # fmt: skip
USAGE = """\
usage: hf-layerprune <verb> [--config recipe.yaml] [--setting value ...]

  compress     remove layers one by one, each chosen by measurement and healed by distillation
  parallelize  run layers in parallel (or leave some out) without training
  generate     write down a teacher's own answers, to heal on
  score        measure and plot the importance of every layer
  evaluate     measure a checkpoint, alone or against a teacher
  benchmark    measure speed and memory of one or more checkpoints, side by side
  plan         say what a run needs before it starts: memory, disk, tokens, rough time
  convert      write a checkpoint in another family's form, such as Llama as Qwen2, with the same logits
  push         put the student of a run on the Hub, with its report and a card
  push-space   make or update a Space on the Hub that compares students with their originals
  demo         compare original and compressed side by side, in the browser

hf-layerprune <verb> --help lists the settings of a verb. Without --model those that need one work on the small English
teacher that comes with the package.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if argv[0] not in VERBS:
        sys.stderr.write(f"hf-layerprune: no verb {argv[0]!r}; choose one of {', '.join(VERBS)}\n")
        return 2
    from ..errors import LayerPruneError, first_line, is_out_of_memory
    from .benchmark import benchmark
    from .compress import compress
    from .convert import convert
    from .demo import demo
    from .generate import generate
    from .measure import evaluate, score
    from .parallelize import parallelize
    from .plan import plan
    from .push import push
    from .push_space import push_space

    every = (compress, parallelize, generate, score, evaluate, benchmark, plan, convert, push, push_space, demo)
    verbs = dict(zip(VERBS, every, strict=True))
    _quiet()
    try:
        verbs[argv[0]](argv[1:])
    except (LayerPruneError, OSError) as error:  # OSError: a full disk, a folder that is a file, no permission
        sys.stderr.write(f"hf-layerprune: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt as stop:
        goes_on = str(stop) or ("what is done is kept, the same command goes on" if argv[0] == "generate" else "")
        sys.stderr.write(f"hf-layerprune: stopped{'; ' if goes_on else ''}{goes_on}\n")
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        less = "give fewer rows at a time (batch_size), shorter ones (max_length), or a smaller model or dtype"
        sys.stderr.write(f"hf-layerprune: out of memory: {first_line(error)}; {less}\n")
        return 2
    return 0


def _quiet() -> None:
    """The table and the bar speak for the run; libraries only where something is wrong."""
    import datasets
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()
