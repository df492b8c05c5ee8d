"""A reader follows a tensor one way: modules → functions → kernels → triton_kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["modules", "functions", "kernels", "triton_kernels"]


def imports(path):
    """Every module the file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by absolute name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(layer, name):
    """Whether a file of `layer` must not import `name`."""
    package, _, rest = name.partition(".")
    if package in ("torch_manual", "triton_kernels") and layer == "triton_kernels":
        return not name.startswith("torch_manual.triton_kernels.")
    if package != "torch_manual":
        return False
    target = rest.partition(".")[0]
    if target not in LAYERS:
        return True
    if target == "triton_kernels":
        return layer != "kernels"
    return LAYERS.index(target) < LAYERS.index(layer)


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_imports_upward(layer):
    folder = ROOT / (layer if layer == "triton_kernels" else f"torch_manual/{layer}")
    files = list(folder.rglob("*.py"))
    assert files
    found = [(f.name, n) for f in files for n in imports(f) if upward(layer, n)]
    assert not found


def test_the_rule_finds_offenders():
    assert upward("kernels", "torch_manual.functions.lstm")
    assert upward("functions", "torch_manual.modules.lstm.LSTM")
    assert upward("functions", "torch_manual.LSTM")
    assert upward("functions", "torch_manual.triton_kernels.lstm")
    assert upward("triton_kernels", "torch_manual.kernels.lstm")
    assert not upward("modules", "torch_manual.kernels.lstm")
    assert not upward("kernels", "torch_manual.triton_kernels.lstm")
    assert not upward("triton_kernels", "torch_manual.triton_kernels._math.sigmoid")
