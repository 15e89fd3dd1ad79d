"""`hf-layerprune export`: a student as a GGUF file, for llama.cpp and Ollama."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from ..errors import LayerPruneError
from ..export import check_exportable, export_gguf
from ..files import write_atomically
from ..gguf_vocabulary import vocabulary_of
from ..loading import is_gguf, load_config, load_model, load_tokenizer, require_gguf, split_revision
from ..modelfile import HEAD, modelfile
from ..progress import Phases, say
from .common import writable
from .parsing import parse


def export(argv: list[str]) -> None:
    """Write the file, a Modelfile next to it, and print the commands that run them."""
    (arguments,) = parse("export", argv)
    if arguments.student is None:
        raise LayerPruneError("which student? hf-layerprune export STUDENT, a run's folder, a model or a Hub id")
    name = _short_name(arguments.student)
    path = Path(arguments.output_file or f"{name}-{arguments.outtype}.gguf")
    instructions = _free_modelfile(path)
    require_gguf()
    config, tokenizer = load_config(arguments.student), load_tokenizer(arguments.student)
    try:
        check_exportable(config)
        vocabulary_of(tokenizer, config)
    except LayerPruneError as error:
        raise LayerPruneError(f"{arguments.student}: {error}") from error
    with writable(path.parent), Phases() as phases:
        phases.phase(f"loading {arguments.student}")
        model = load_model(arguments.student)
        phases.phase(f"writing {path}", len(list(model.parameters())))
        export_gguf(model, tokenizer, path, arguments.outtype, name=name, on_tensor=phases.step)
        write_atomically(instructions, modelfile(path.name, tokenizer))
        layers, size = model.config.num_hidden_layers, path.stat().st_size / 1e6
    say(phases.out, f"gguf: {path}   {layers} layers, {arguments.outtype}, {size:,.1f} MB")
    say(phases.out, f"llama.cpp: llama-cli -m {quote(str(path))}")
    called = quote(name.lower())
    say(phases.out, f"Ollama: ollama create {called} -f {quote(str(instructions))} && ollama run {called}")


def _short_name(student: str) -> str:
    """What to call a student: the last part of its name that tells it from others."""
    name, revision = split_revision(student)
    path = Path(name).absolute() if Path(name).exists() else Path(name)
    if is_gguf(name):
        return path.stem
    parts = path.parts[-3:]
    if parts[-1] == "model" and len(parts) > 1:
        return parts[-2]
    if len(parts) == 3 and parts[1] == "rounds":
        return f"{parts[0]}-round-{parts[2]}"
    return parts[-1] + (f"-{revision}" if revision else "")


def _free_modelfile(path: Path) -> Path:
    """Where the Modelfile of a new file goes: next to it, under a name that no other file's has; refuse to write over
    a file that this verb has not made."""
    if path.exists():
        raise LayerPruneError(f"{path} exists; remove it, or choose another --output_file")
    if path.suffix.lower() != ".gguf":
        raise LayerPruneError(f"output_file={path} must end in .gguf, by which it is recognised")
    for instructions in (path.with_name("Modelfile"), path.with_suffix(".Modelfile")):
        text = instructions.read_bytes() if instructions.exists() else None
        if text is not None and not text.startswith(HEAD.encode()):
            raise LayerPruneError(f"{instructions} exists and is your own; choose an --output_file in another folder")
        if text is None or f"\nFROM ./{path.name}\n".encode() in text:
            break
    return instructions
