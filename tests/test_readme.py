"""The examples of the README and of docs/integrations.md run as they stand, one after another."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_blocks(page: str, at_least: int) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert len(blocks) >= at_least
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)


def test_examples_run():
    run_blocks("README.md", 5)


def test_examples_of_integrations_run():
    pytest.importorskip("transformers", minversion="5", reason="the extra [transformers] is not installed")
    run_blocks("docs/integrations.md", 3)
