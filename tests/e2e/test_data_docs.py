"""The commands of docs/data.md run, in their order, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

from harness import read_lines

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 5
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    out = ""
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e", "-c", block],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        out += done.stdout
    assert "tokens: 200 documents" in out and "documents      200" in out
    assert "assistant\n]]Hello<|im_end|>" in out
    lines = read_lines(tmp_path / "outputs" / "metrics.jsonl")
    assert lines[-1]["step"] == 3 and "data_padding_share" in lines[-1]
