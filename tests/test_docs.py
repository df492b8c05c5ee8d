"""The Python on the documentation's pages runs, section by section."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "transforms.md"
TITLE, *SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.partition("\n")[0])
def test_section(section: str) -> None:
    torch._dynamo.reset()
    code = [*blocks(TITLE), *blocks(section)]
    assert len(code) > 1
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
