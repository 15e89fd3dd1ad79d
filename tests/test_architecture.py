"""The shape of the repository: imports run one way, shipped files stand alone, files stay small."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_layerprune"
# A module may import only from those before it.
ORDER = (
    "errors", "files", "fingerprint", "plan", "models", "architectures", "surgery", "matching",
    "_trl", "losses", "rows", "data", "environment", "loading", "forward", "tasks", "compensation", "scoring",
    "healing_data_config", "healing_data", "evaluation", "shapes", "benchmark", "budget", "search", "record",
    "record_reader", "plots", "report", "hub", "trainer", "memory", "estimate", "progress", "demo", "cli", "__init__",
)  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))
SHIPPED = sorted((PACKAGE / "models").glob("*_pruned_qwen2.py"))


def top_level(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def relative_imports(path):
    """Top-level modules of the package that `path` imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            depth = len(path.relative_to(PACKAGE).parts) - 1
            above = node.level - 1
            if above == depth:  # the package itself
                names = [alias.name for alias in node.names if alias.name != "__version__"]
                yield from [node.module.split(".")[0]] if node.module else names


def test_the_order_names_every_module():
    assert {top_level(path) for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    for imported in relative_imports(path):
        assert ORDER.index(imported) < ORDER.index(top_level(path)), f"{path.name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_of_one_thought_and_have_a_door(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), "a module opens with what it is for"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_import_only_what_a_stranger_has(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert (node.level, node.module) == (1, "configuration_pruned_qwen2")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert all(name.split(".")[0] in ("torch", "transformers", "copy", "re") for name in names)
    assert "from ." not in text.replace("from .configuration_pruned_qwen2", "")


def test_typed():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_have_types(path):
    if path in SHIPPED:
        return  # written in the style of transformers' own model files
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not untyped and node.returns is not None, f"{path.name}: {node.name} {untyped}"
