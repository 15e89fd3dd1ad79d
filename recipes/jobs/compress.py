# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-layerprune[plots]"]
# ///
"""`hf-layerprune compress` on Hugging Face Jobs, in a run that the next job continues.

    compress.py /runs/qwen-18 --model Qwen/Qwen2.5-0.5B --dataset ... --target_num_layers 18

The first word is a folder on a mounted bucket; all others are settings of `compress`. The run works on the disk of the
job, because a bucket need not have locks and renamed folders, and is copied to the bucket every few minutes and at its
end. If the folder holds a run, that one is resumed.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

STATE_FILE = "run_state.json"  # what a run resumes from
SECONDS = 300.0  # between two copies


def main(argv: list[str] | None = None) -> int:
    """Run or resume in `run`, and keep a copy; returns the exit status of `compress`."""
    folder, *settings = sys.argv[1:] if argv is None else argv
    kept, work, copied = Path(folder), Path("run"), {}
    if (kept / STATE_FILE).is_file():
        shutil.copytree(kept, work, dirs_exist_ok=True)
        settings += ["--resume", "true"]
    command = [sys.executable, "-m", "hf_layerprune.cli", "compress", *settings, "--output_dir", str(work)]
    process = subprocess.Popen(command)
    for number in (signal.SIGINT, signal.SIGTERM):  # compress saves a checkpoint and ends
        signal.signal(number, lambda number, frame: process.send_signal(number))
    while process.poll() is None:
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            keep(work, kept, copied)
    keep(work, kept, copied)
    return process.returncode


def keep(work: Path, kept: Path, copied: dict[Path, tuple[int, int]]) -> None:
    """Copy what has changed since it was `copied`, so that what the state names is there even if this is cut off.

    The state is read first and written last; what the run has deleted goes after that.
    """
    if not (work / STATE_FILE).is_file():
        return
    state = (work / STATE_FILE).read_bytes()
    files = [path.relative_to(work) for path in sorted(work.rglob("*")) if path.is_file()]
    for name in (name for name in files if name.name not in (".lock", STATE_FILE)):
        try:
            now = (work / name).stat()
            if copied.get(name) != (stamp := (now.st_mtime_ns, now.st_size)):
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(work / name, kept / name)
                copied[name] = stamp
        except FileNotFoundError:  # deleted meanwhile
            continue
    (kept / STATE_FILE).write_bytes(state)
    for path in sorted(kept.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(kept) not in files:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


if __name__ == "__main__":
    sys.exit(main())
