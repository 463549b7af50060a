"""The one file: what goes into it, and that it runs where there is nothing but Python and torch."""

import ast
import os
import subprocess
import sys
import venv
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

from pdengine.deploy.build_binary import MAIN, build, needed_distributions

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("cli", "router", "client", "engine", "models", "triton_kernels", "transport")
NOT_IN_IT = {"torch", "triton"}  # of the Python that runs the file
OF_DEVELOPERS = {"transformers", "matplotlib"}  # makes the demo checkpoint; draws figures


def test_torch_and_what_only_it_needs_is_left_out() -> None:
    needed = needed_distributions("pdengine[cu12]", without=("torch",))
    assert {"pdengine", "libucx-cu12", "numba", "llvmlite", "uvloop", "jinja2"} <= set(needed)
    assert not {"torch", "triton", "sympy", "networkx", "pytest"} & set(needed)
    assert not [name for name in needed if name.startswith("nvidia")]
    assert needed["numba"] == distribution("numba").version
    assert {"torch", "sympy"} <= set(needed_distributions("pdengine[cu12]"))


def test_whatever_the_code_imports_goes_in() -> None:
    needed = set(needed_distributions("pdengine[cu12]", without=("torch",)))
    provided = {
        module
        for module, names in packages_distributions().items()
        if needed & {name.lower().replace("_", "-") for name in names}
    }
    imported = {
        name.split(".")[0]
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "numba" in imported
    assert imported - provided - set(sys.stdlib_module_names) <= NOT_IN_IT | OF_DEVELOPERS | {"pdengine"}


def test_another_python_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    main = tmp_path / "__main__.py"
    main.write_text(MAIN.format(version=(3, 99)))
    result = subprocess.run([sys.executable, main], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "was built for Python 3.99" in result.stderr
    assert "Traceback" not in result.stderr


def python_with_torch(directory: Path) -> Path:
    """The Python of a new virtual environment in which torch is installed, by links, and nothing else."""
    venv.create(directory, with_pip=False)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site_packages = directory / "lib" / version / "site-packages"
    for name in needed_distributions("torch"):
        for file in distribution(name).files or []:
            link = site_packages / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(distribution(name).locate_file(file.parts[0]))
    return directory / "bin" / "python"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_demo_runs_from_the_file_alone(tmp_path: Path) -> None:
    file, away = tmp_path / "dist" / "pdengine", tmp_path / "away"
    build(file, "cu12", with_torch=False)
    away.mkdir()
    python = python_with_torch(tmp_path / "machine")
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PDENGINE"))
    }
    environment |= {"HOME": str(away), "SHIV_ROOT": str(away / "cache")}

    def run(*arguments: str, **changes: str) -> str:
        command = [str(python), str(file), *arguments]
        return subprocess.run(
            command,
            cwd=away,
            env=environment | changes,
            stdout=subprocess.PIPE,
            text=True,
            timeout=300,
            check=True,
        ).stdout

    assert run("--version").startswith("pdengine, version ")
    (away / "where.py").write_text(
        "import sys, pdengine.cli.main as m; print(m.__file__, *sys.path, sep='\\n')"
    )
    places = run("where.py", SHIV_INTERPRETER="1").splitlines()
    assert places[0].startswith(str(away / "cache"))
    assert not [place for place in places if place.startswith((str(ROOT), sys.prefix))]
    other = away / "pdengine" / "cli" / "__main__.py"
    other.parent.mkdir(parents=True)
    other.write_text("raise SystemExit('the code of the working directory was run')")
    assert "32 of 32 answers are right." in run("demo")
    refused = subprocess.run(
        [python, file, "--version"],
        env=environment | {"SHIV_ROOT": str(other / "no directory")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: this file unpacks itself into ")
    assert "Traceback" not in refused.stderr
