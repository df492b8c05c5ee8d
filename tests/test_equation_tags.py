"""Every numbered equation of a derivation stands, under its tag, in the code that computes it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {page.stem: page for page in sorted((ROOT / "docs/derivations").glob("*.md"))}


def equations(text):
    """The tags that a page defines: bold, as in **B4**."""
    return set(re.findall(r"\*\*([FBR]\d+)\*\*", text))


def tags(text):
    """The tags that code carries in its comments: `# B4`, `// B4`, or several, `# F2, F3`."""
    found = set()
    for comment in re.findall(r"(?:#|//|/\*)\s*((?:[FBR]\d+(?:[,:]?\s*|$))+)", text):
        found |= set(re.findall(r"[FBR]\d+", comment))
    return found


def code(name):
    """The plain-torch code of a layer: functions/lstm.py, kernels/lstm.py, kernels/lstm_*.py."""
    files = [f for k in ("functions", "kernels") for f in (ROOT / "torch_manual" / k).glob("*.py")]
    return "\n".join(f.read_text() for f in files if re.fullmatch(rf"{name}(_.*)?", f.stem))


@pytest.mark.parametrize("name", [n for n, p in PAGES.items() if equations(p.read_text())])
def test_every_equation_is_in_the_code(name):
    defined, computed = equations(PAGES[name].read_text()), tags(code(name))
    assert defined - computed == set(), "in the derivation only"
    assert computed - defined == set(), "in the code only"


@pytest.mark.parametrize("name", ["lstm"])
def test_the_compiled_kernel_carries_the_recurrences_tags(name):
    files = (ROOT / "torch_manual/csrc").glob(f"{name}*.h")
    found = tags("\n".join(f.read_text() for f in files))
    kernels = ROOT / "torch_manual/kernels"
    plain = tags("".join(f.read_text() for f in kernels.glob(f"{name}*.py")))
    assert len(plain) > 10
    assert plain - found == set(), "not in C"
    assert found - plain == set(), "in C only"


def test_every_layer_has_a_derivation():
    layers = {p.stem for p in (ROOT / "torch_manual/modules").glob("[a-z]*.py")}
    assert layers <= set(PAGES)


def test_the_articles_page_names_lines_that_exist():
    named = set(re.findall(r"\b([FB]\d+)\b", PAGES["peephole_lstm"].read_text()))
    assert named
    assert named <= equations(PAGES["lstm"].read_text())


def test_tags_are_read():
    assert tags("a = b  # F2\nc = d  # B1, B2\n x = y; // F12\n z  # see F3") == {
        "F2",
        "B1",
        "B2",
        "F12",
    }
