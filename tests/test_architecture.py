"""The shape of the repository: imports run one way, shipped files stand alone, files stay small."""

import ast
import re
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_layerprune"
MODULES = sorted(PACKAGE.rglob("*.py"))
SHIPPED = sorted((PACKAGE / "models").glob("*_pruned_qwen2.py"))
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
JSON_IS_PASSED_ON = {
    "environment.py environment", "hub/runs.py Run.recipe",
    "hub/paths.py public_settings", "hub/paths.py with_absolute_paths", "cli/common.py write_recipe",
    "trainer/run.py RunFile.open", "trainer/run.py RunFile.begin_run", "trainer/run.py check_resume",
    "trainer/run.py check_same", "trainer/run.py decisive_settings", "demo/service.py DemoService.stream",
}  # fmt: skip
A_LIBRARY_WANTS_IT = {
    "loading.py beside_weights", "tasks/kinds.py costs_of_samples",
    "trainer/config.py IterativeLayerDistillConfig.init_kwargs",
    "trainer/healing.py HealingTrainer.compute_loss", "trainer/healing.py HealingTrainer.training_step",
}  # fmt: skip
"""Keyword arguments of `transformers`, and signatures of `Trainer` and lm-eval."""


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def order() -> list[str]:
    """The modules and rooms of the package, as docs/architecture.md lists them."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    (listed,) = re.findall(r"^## What a room may import\n.*?^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [name for line in listed.splitlines() for name in line.split("  ")[0].split(", ")] + ["__init__"]


def imported_files(path: Path, nodes: Iterable[ast.AST]) -> Iterator[Path]:
    """Files of the package that these nodes of a file import."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                places = (place / alias.name, place)
                files = (file for one in places for file in (one.with_suffix(".py"), one / "__init__.py"))
                yield next(file for file in files if file in TREES)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_run_one_way():
    position = {name: index for index, name in enumerate(order())}
    assert set(position) == {room_of(path) for path in MODULES}, "docs/architecture.md lists other modules"
    for path, tree in TREES.items():
        for file in imported_files(path, ast.walk(tree)):
            if room_of(file) not in (room_of(path), "__init__"):  # which holds the version
                message = f"{name_of(path)} imports {name_of(file)}; docs/architecture.md has them in the other order"
                assert position[room_of(file)] < position[room_of(path)], message


def test_no_file_imports_itself_by_way_of_others():
    """Apart from what a function imports when it is called: a verb's settings, which `cli/parsing.py` reads."""
    TopologicalSorter({path: {*imported_files(path, tree.body)} for path, tree in TREES.items()}).prepare()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_import_only_what_a_stranger_has(path):
    text = path.read_text()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert (node.level, node.module) == (1, "configuration_pruned_qwen2")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert all(name.split(".")[0] in ("torch", "transformers", "copy", "re") for name in names)
    assert "from ." not in text.replace("from .configuration_pruned_qwen2", "")


def test_files_are_of_one_thought_and_have_a_door():
    for path, tree in TREES.items():
        assert len(path.read_text().splitlines()) <= 400, path
        assert ast.get_docstring(tree), f"{path} does not open with what it is for"
    assert (PACKAGE / "py.typed").is_file()


def public_functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from public_functions(node.body, f"{node.name}.")
            else:
                yield f"{prefix}{node.name}", node


def test_public_functions_have_types_and_pass_no_loose_dicts():
    """What crosses the border of a module is typed; only JSON itself, or a library, is a dict of anything."""
    allowed = JSON_IS_PASSED_ON | A_LIBRARY_WANTS_IT
    unused = set(allowed)
    for path in {*MODULES} - {*SHIPPED}:  # written in the style of transformers' own model files
        for name, function in public_functions(TREES[path].body):
            where = f"{name_of(path)} {name}"
            arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not untyped and function.returns is not None, f"{where} {untyped}"
            annotations = [a.annotation for a in arguments if a.annotation] + [function.returns]
            loose = any("dict[str, Any]" in ast.unparse(annotation) for annotation in annotations)
            if loose and name.split(".")[-1] not in ("to_dict", "from_dict"):
                assert where in allowed, f"{where} takes or returns a dict[str, Any]"
                unused.discard(where)
    assert not unused, f"{unused} need no exception"
