"""Imports flow one way, and frameworks enter by one door."""

import ast
import pathlib

import keras
import pytest

import keras_infomcr

ROOT = pathlib.Path(keras_infomcr.__file__).parent
FRAMEWORKS = {"tensorflow", "jax", "torch"}

# What each part may import of the package; a part may always import from itself, and all but `core`
# may import `keras_internals`.
MAY_IMPORT = {
    "version": set(),
    "validation": set(),
    "scalars": set(),
    "core": set(),
    "keras_internals": set(),
    "backend": {"core"},
    "objective": {"core", "backend"},
    "labels": {"objective"},
    "layers": {"validation"},
    "regularizers": {"validation", "scalars", "core", "backend", "objective"},
    "flatness": {"validation", "labels", "core", "backend", "objective", "layers"},
    "models": {"validation", "scalars", "labels", "backend", "objective", "regularizers"},
    "callbacks": {"validation", "scalars", "models", "flatness"},
}

# Names so common that a class of ours may have an attribute of its own called so.
COMMON = {"_value", "_metrics"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this test cannot see"
            if node.module == "keras_infomcr":
                yield from (f"keras_infomcr.{alias.name}" for alias in node.names)
            else:
                yield node.module


MODULES = [p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).as_posix() != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_flow_one_way(path):
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    found = {name.split(".")[1] for name in imports(path) if name.startswith("keras_infomcr.")}
    everywhere = {part} if part == "core" else {part, "keras_internals"}
    assert found <= MAY_IMPORT[part] | everywhere


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_frameworks_enter_by_the_backend_alone(path):
    top = {name.split(".")[0] for name in imports(path)}
    if path.relative_to(ROOT).parts[0] == "core":
        assert "keras" not in top
    if path.relative_to(ROOT).parts[0] != "backend":
        assert not top & FRAMEWORKS


def test_no_module_imports_itself_by_way_of_others():
    """Imports within functions count: they hide a circle, and do not open it."""
    graph = {name_of(path): modules_imported(path) for path in MODULES}
    open_, done = [], set()

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name in done:
            return
        open_.append(name)
        for imported in sorted(graph[name]):
            visit(imported)
        open_.pop()
        done.add(name)

    for name in graph:
        visit(name)


def name_of(path):
    parts = ("keras_infomcr", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_imported(path):
    """Return the modules of the package that a module names in its imports."""
    names = set(map(name_of, MODULES))
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in names else node.module)
    return found & names


def private_names(path):
    """Return the private names by which a module asks objects for attributes, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        name = None
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            name = None if of_self and node.attr in COMMON else node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value  # as for `getattr`
        elif isinstance(node, ast.keyword):
            name = node.arg
        if name and name.startswith("_") and not name.startswith("__"):
            yield name, node.lineno if hasattr(node, "lineno") else 0


KERAS_INTERNALS = ROOT / "keras_internals.py"
# A method of Keras that a class of ours overrides has Keras's name.
OVERRIDDEN = {"flatness/loss/measured_loss.py": {"_flatten_layers"}}
PRIVATE = {name for name, _ in private_names(KERAS_INTERNALS)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_private_names_of_keras_stand_in_one_file(path):
    assert {"_flatten_layers", "_compute_loss", "_fn_kwargs"} <= PRIVATE
    if path == KERAS_INTERNALS:
        return
    assert not [name for name in imports(path) if name.startswith("keras.src")]
    overridden = OVERRIDDEN.get(path.relative_to(ROOT).as_posix(), set())
    found = [(name, line) for name, line in private_names(path) if name in PRIVATE - overridden]
    assert not found


def test_a_star_import_leaves_the_modules_of_keras_in_place():
    names = {}
    exec("from keras import *\nfrom keras_infomcr import *", names)
    for name in ("callbacks", "layers", "models", "regularizers"):
        assert names[name] is getattr(keras, name)
    assert names["RegularizedModel"] is keras_infomcr.RegularizedModel
    assert keras_infomcr.regularizers.SubBatchPerturbation  # `import keras_infomcr` is enough
