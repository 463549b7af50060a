"""No folder imports a higher floor."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "cli": {"router", "engine", "client", "bench", "models", "transport"},
    "bench": {"cli", "router", "engine", "client", "models", "triton_kernels", "transport"},
    "router": {"client", "transport", "models"},  # router/http is a client of the router
    "client": {"transport"},
    "engine": {"models", "triton_kernels", "transport"},
    "models": {"triton_kernels"},
    "transport": set(),
    "triton_kernels": set(),
}
NO_TORCH = [
    "engine/scheduler.py",
    "engine/block_pool.py",
    "engine/free_blocks.py",
    "engine/pinned_blocks.py",
    "engine/step_limit.py",
    "engine/sequence.py",
    "engine/step.py",
    "engine/leases.py",
    "engine/logit_table.py",
    "models/prefix_hashes.py",
]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folder_imports_no_higher_floor(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        floors = {name.split(".")[1] for name in imported_modules(path) if name.startswith("pdengine.")}
        assert floors <= ALLOWED[folder] | {folder}, path


@pytest.mark.parametrize("path", NO_TORCH)
def test_scheduling_knows_no_torch(path: str) -> None:
    assert not any(name.split(".")[0] == "torch" for name in imported_modules(ROOT / path))


@pytest.mark.parametrize("module", ["pdengine.router.router", "pdengine.client", "pdengine.cli.main"])
def test_the_front_door_loads_no_torch(module: str) -> None:
    """A router needs no torch to start, and neither does a client."""
    import subprocess
    import sys

    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
