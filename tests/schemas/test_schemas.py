"""The dashboard and the Kubernetes manifest, read by the types that Grafana and Kubernetes publish for Go."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.services.building import find_go

HERE = Path(__file__).parent
DEPLOY = HERE.parents[1] / "deploy"
BOARD, MANIFEST = DEPLOY / "grafana" / "consul-prom.json", DEPLOY / "kubernetes" / "shop.yml"


@pytest.mark.full  # Go downloads and compiles some hundred packages for it, for a minute
@pytest.mark.timeout(600)
def test_strictly(tmp_path: Path) -> None:
    """Neither has a field that is not known or lacks one that is required; one that is misspelt is found."""
    program = tmp_path / "schemas"
    command = [str(find_go(needed=(1, 22))), "build", "-mod=readonly", "-o", str(program), "."]
    subprocess.run(command, cwd=HERE, check=True, timeout=500)

    def complaints(board: Path, manifest: Path) -> list[str]:
        done = subprocess.run([program, board, manifest], capture_output=True, text=True, check=True, timeout=60)
        *found, summary = done.stdout.splitlines()
        assert summary == f"{len(json.loads(BOARD.read_text())['panels'])} panels, 1 containers"
        return found

    assert complaints(BOARD, MANIFEST) == []
    board, manifest = tmp_path / "board.json", tmp_path / "shop.yml"
    board.write_text(BOARD.read_text().replace('"showLegend"', '"showLegends"'))
    manifest.write_text(MANIFEST.read_text().replace("runAsNonRoot", "runAsNoRoot"))
    found = "\n".join(complaints(board, manifest))
    assert "unexpected field 'showLegends'" in found
    assert 'unknown field "runAsNoRoot"' in found
