"""Carry files to a machine that no network reaches, in parts of limited size: a checkpoint, wheels, anything.

    python benchmarks/carry.py split model.gguf wheels --output runs/parts      # here
    python benchmarks/carry.py join runs/parts --output runs/carried            # there, when the parts have arrived

`split` writes manifest.json, with the checksum of every part and of every file, and part-001, part-002, ...; how they
get there does not matter. `join` names each part that is missing or damaged, and writes nothing unless all are right.
This file needs Python alone. The same files always make the same parts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 2**20
PART_MIB = 36
"""Leaves room for this repository in a transfer of 64 MiB."""
MANIFEST = "manifest.json"


class PartWriter:
    """A file of any length that is written as parts of at most `size` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.parts, self.waiting = folder, size, [], bytearray()

    def write(self, data: bytes) -> int:
        self.waiting += data
        while len(self.waiting) >= self.size:
            self._finish(self.size)
        return len(data)

    def close(self) -> None:
        if self.waiting:
            self._finish(len(self.waiting))

    def _finish(self, size: int) -> None:
        content, name = bytes(self.waiting[:size]), f"part-{len(self.parts) + 1:03d}"
        del self.waiting[:size]
        (self.folder / name).write_bytes(content)
        self.parts.append({"name": name, "bytes": size, "sha256": hashlib.sha256(content).hexdigest()})


class PartReader:
    """The parts of a folder as one file."""

    def __init__(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        self.blocks, self.waiting = self._read(folder, parts), b""

    @staticmethod
    def _read(folder: Path, parts: list[dict[str, Any]]) -> Iterator[bytes]:
        for part in parts:
            with (folder / part["name"]).open("rb") as file:
                while block := file.read(MIB):
                    yield block

    def read(self, size: int) -> bytes:
        found = [self.waiting]
        missing = size - len(self.waiting)
        while missing > 0 and (block := next(self.blocks, b"")):
            found.append(block)
            missing -= len(block)
        whole = b"".join(found)
        self.waiting = whole[size:]
        return whole[:size]


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(MIB):
            digest.update(block)
    return digest.hexdigest()


def files_of(paths: list[Path]) -> dict[str, Path]:
    """Every file by its name there: that of the file, or that of its folder and its place in it."""
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        whole = path.resolve()
        inside = [item for item in sorted(whole.rglob("*")) if item.is_file()] if whole.is_dir() else [whole]
        for item in inside:
            name = item.relative_to(whole.parent).as_posix()
            if name in found:
                raise FileExistsError(f"{found[name]} and {item} would both arrive as {name}; rename one")
            found[name] = item
    return found


def split(paths: list[Path], folder: Path, size: int) -> dict[str, Any]:
    """Write the parts and their manifest; those that were there before are deleted."""
    files = files_of(paths)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("part-*"), folder / MANIFEST):
        old.unlink(missing_ok=True)
    writer = PartWriter(folder, size)
    with tarfile.open(mode="w|", fileobj=writer) as archive:
        for name, path in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(entry, file)
    writer.close()
    sums = {name: {"bytes": path.stat().st_size, "sha256": checksum(path)} for name, path in files.items()}
    manifest = {"files": sums, "parts": writer.parts}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def problems(folder: Path, parts: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the parts that have arrived."""
    found = []
    for part in parts:
        path = folder / part["name"]
        if not path.is_file():
            found.append(f"{part['name']} has not arrived")
        elif path.stat().st_size != part["bytes"] or checksum(path) != part["sha256"]:
            found.append(f"{part['name']} is damaged; send it again")
    return found


def join(folder: Path, target: Path) -> list[str]:
    """Put the files together in `target`, which must not exist yet; returns what keeps it from that."""
    if target.exists():
        return [f"{target} exists; delete it, or choose another folder"]
    if not (folder / MANIFEST).is_file():
        return [f"{folder} has no {MANIFEST}; send it with the parts"]
    manifest = json.loads((folder / MANIFEST).read_text())
    if wrong := problems(folder, manifest["parts"]):
        return wrong
    unfinished = target.with_name(target.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with tarfile.open(mode="r|", fileobj=PartReader(folder, manifest["parts"])) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.10.12 and 3.11.4 on
        archive.extractall(unfinished, **safely)
    wrong = [name for name, about in manifest["files"].items() if checksum(unfinished / name) != about["sha256"]]
    if wrong:
        return [f"{name} is not what was sent, though its parts are; split it again" for name in wrong]
    unfinished.rename(target)
    return []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    apart = verbs.add_parser("split", help="write parts of files and folders")
    apart.add_argument("paths", nargs="+", type=Path)
    apart.add_argument("--output", type=Path, required=True, help="folder for the parts; parts in it are replaced")
    apart.add_argument("--part_mib", type=int, default=PART_MIB, help="largest part, in MiB, 60 at most")
    together = verbs.add_parser("join", help="put files together from parts")
    together.add_argument("folder", type=Path)
    together.add_argument("--output", type=Path, required=True, help="a new folder for the files")
    arguments = parser.parse_args(argv)
    if arguments.verb == "join":
        if wrong := join(arguments.folder, arguments.output):
            print("\n".join(wrong), file=sys.stderr)
            sys.exit(2)
        print(arguments.output)
        return
    if not 1 <= arguments.part_mib <= 60:
        apart.error(f"--part_mib {arguments.part_mib} is out of range; choose 1 to 60")
    try:
        manifest = split(arguments.paths, arguments.output, arguments.part_mib * MIB)
    except OSError as error:
        apart.error(str(error))
    total = sum(part["bytes"] for part in manifest["parts"])
    print(
        f"{len(manifest['files'])} files, {total / MIB:.1f} MiB in {len(manifest['parts'])} parts: {arguments.output}"
    )


if __name__ == "__main__":
    main()
