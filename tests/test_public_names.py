"""What programs import from ``capray``: there, loaded late, and the same for type checkers."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import capray

HEAVY = {"torch", "ray", "mlflow", "pyarrow", "duckdb", "pydantic", "numpy"}


@pytest.mark.parametrize("name", capray.__all__)
def test_a_name_is_what_its_module_has(name):
    value = getattr(capray, name)
    assert getattr(import_module(value.__module__), value.__name__) is value


def test_none_is_made_up():
    with pytest.raises(AttributeError, match="module 'capray' has no attribute 'captions'"):
        _ = capray.captions


def test_type_checkers_see_the_same_names_in_the_same_places():
    (block,) = (node for node in ast.parse(Path(capray.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == capray._MODULES
    assert set(capray.__all__) <= set(dir(capray))


def test_importing_the_package_alone_loads_nothing_heavy():
    code = "import capray, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)
