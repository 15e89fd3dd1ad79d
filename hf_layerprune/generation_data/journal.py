"""What is on disk while answers are generated, and when they are done.

answers.jsonl                  the rows, written at the end in one move
answers.jsonl.run.json         what decides them; at the end also what came out
answers.jsonl.rank0.partial    answers so far, a line per batch, one file per process; gone at the end
answers.jsonl.lock             held by the run that is at work; gone at the end
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import LayerPruneError
from ..files import digest, to_json, write_atomically


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        row (`int`): number of the prompt's row in the data set.
        text (`str`): what the teacher wrote.
        num_tokens (`int`): tokens it wrote, without the end token.
        truncated (`bool`): whether it was cut at the longest length.
    """

    row: int
    text: str
    num_tokens: int
    truncated: bool


@dataclass(frozen=True)
class HealingDataReport:
    """What [`generate_healing_data`] wrote.

    Attributes:
        num_rows (`int`): rows in the file.
        num_empty (`int`): prompts without a row, because the answer was blank.
        num_truncated (`int`): answers that were cut at `max_new_tokens`: rows if they were to be kept.
        num_tokens (`int`): tokens of the answers in the file.
    """

    num_rows: int
    num_empty: int
    num_truncated: int
    num_tokens: int


class Journal:
    """The files of one data set in the making."""

    def __init__(self, output_file: Path, settings: dict[str, Any]) -> None:
        self.output_file = output_file
        self.run_file = output_file.with_name(f"{output_file.name}.run.json")
        self.lock_file = output_file.with_name(f"{output_file.name}.lock")
        self._lock: FileLock | None = None
        self.settings = json.loads(to_json(settings))

    def finished(self) -> HealingDataReport | None:
        """What was written, if everything is done.

        Raises:
            [`LayerPruneError`]: if other answers than those of `settings` are there, whole or in part.
        """
        if self.output_file.suffix != ".jsonl" or self.output_file.is_dir():
            raise LayerPruneError(f"output_file={self.output_file} must be a file whose name ends in .jsonl")
        another = "choose another output_file"
        if not self.run_file.is_file():
            if self.output_file.exists():
                raise LayerPruneError(f"{self.output_file} is there and not of such a run; {another}")
            if partial := self._partial_files():
                raise LayerPruneError(
                    f"{partial[0]} holds answers of a run whose settings are gone; delete it, or {another}"
                )
            return None
        try:
            found = json.loads(self.run_file.read_text())
            settings, report, sha256 = found["settings"], found["report"], found["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise LayerPruneError(f"{self.run_file} is damaged; {another}") from error
        for key in sorted({*settings, *self.settings}):
            was, is_now = settings.get(key), self.settings.get(key)
            if was != is_now:
                raise LayerPruneError(
                    f"{self.output_file} holds answers of another run: {key} was {was!r}, now it is {is_now!r}; "
                    f"{another}"
                )
        if report is None:
            return None
        if not self.output_file.is_file() or digest(self.output_file) != sha256:
            raise LayerPruneError(
                f"{self.output_file} is not as it was written; {another}, or delete it and {self.run_file.name}"
            )
        return HealingDataReport(**report)

    def open(self) -> None:
        """Keep other runs out and say what is going to be written here.

        Raises:
            [`LayerPruneError`]: if another run is at work, or has been.
        """
        self.output_file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.lock_file)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise LayerPruneError(
                f"{self.output_file} is in use: another run is writing it; wait for it, or choose another output_file"
            ) from None
        if self.finished() is not None:
            raise LayerPruneError(f"{self.output_file} has just been written by another run")
        if not self.run_file.exists():
            self._write_run_file(None, None)

    def release(self) -> None:
        """Let other runs in."""
        if self._lock is not None:
            self._lock.release()

    def answers(self) -> dict[int, Answer]:
        """The answers so far, by their rows. What a kill left half written is as if it were not there."""
        found = {}
        for path in self._partial_files():
            for line in path.read_bytes().splitlines():
                try:
                    found |= {answer["row"]: Answer(**answer) for answer in json.loads(line)}
                except ValueError:
                    continue
        return found

    def append(self, answers: Iterable[Answer], rank: int) -> None:
        """Write the answers of one batch so that they outlast the process."""
        with self.output_file.with_name(f"{self.output_file.name}.rank{rank}.partial").open("ab") as file:
            # the line break comes first: what stands before may be half a line
            file.write(b"\n" + json.dumps([asdict(answer) for answer in answers]).encode())
            file.flush()
            os.fsync(file.fileno())

    def close(self, rows: Iterable[dict[str, Any]], report: HealingDataReport) -> None:
        """Put the rows in their place."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self.output_file, lines)
        self._write_run_file(asdict(report), digest(self.output_file))
        self.clear()

    def clear(self) -> None:
        """Remove what a finished run needs no more."""
        for path in (*self._partial_files(), self.lock_file):
            path.unlink(missing_ok=True)

    def _partial_files(self) -> list[Path]:
        start, here = f"{self.output_file.name}.rank", self.output_file.parent
        found = here.iterdir() if here.is_dir() else ()
        return sorted(path for path in found if path.name.startswith(start) and path.suffix == ".partial")

    def _write_run_file(self, report: dict[str, int] | None, sha256: str | None) -> None:
        content = {"settings": self.settings, "report": report, "sha256": sha256}
        write_atomically(self.run_file, to_json(content))
