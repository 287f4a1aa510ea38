"""Promises about the repository itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.e2e


def test_imports_go_down_only() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout
    assert "2 kept, 0 broken" in checked.stdout


def test_the_simple_example_answers_its_questions(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_BATCH_")}
    done = subprocess.run(
        [sys.executable, "examples/simple_batch.py"],
        cwd=ROOT,
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3 answered, 0 error rows" in done.stdout
    assert len((ROOT / "examples" / "simple_batch.py").read_text().splitlines()) < 80
