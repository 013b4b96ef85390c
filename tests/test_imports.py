"""Imports flow one way, and frameworks enter by one door."""

import ast
import pathlib

import keras
import pytest

import keras_infomcr

ROOT = pathlib.Path(keras_infomcr.__file__).parent
FRAMEWORKS = {"tensorflow", "jax", "torch"}

# What each part may import of the package; a part may always import from itself.
MAY_IMPORT = {
    "version": set(),
    "validation": set(),
    "scalars": set(),
    "core": set(),
    "backend": {"core"},
    "objective": {"core", "backend"},
    "labels": {"objective"},
    "layers": {"validation"},
    "regularizers": {"validation", "scalars", "core", "backend", "objective"},
    "flatness": {"validation", "labels", "core", "backend", "objective", "layers"},
    "models": {"validation", "scalars", "labels", "backend", "objective", "regularizers"},
    "callbacks": {"validation", "scalars", "models", "flatness"},
}


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
    assert found <= MAY_IMPORT[part] | {part}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_frameworks_enter_by_the_backend_alone(path):
    top = {name.split(".")[0] for name in imports(path)}
    if path.relative_to(ROOT).parts[0] == "core":
        assert "keras" not in top
    if path.relative_to(ROOT).parts[0] != "backend":
        assert not top & FRAMEWORKS


def test_a_star_import_leaves_the_modules_of_keras_in_place():
    names = {}
    exec("from keras import *\nfrom keras_infomcr import *", names)
    for name in ("callbacks", "layers", "models", "regularizers"):
        assert names[name] is getattr(keras, name)
    assert names["RegularizedModel"] is keras_infomcr.RegularizedModel
    assert keras_infomcr.regularizers.SubBatchPerturbation  # `import keras_infomcr` is enough
