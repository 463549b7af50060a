"""`make binary`: one executable file with pdengine and the packages it needs, at the versions installed here.

The file is a zip archive that Python runs; shiv (https://shiv.readthedocs.io) packs it. At its first start it
unpacks itself into a folder of its own under SHIV_ROOT: the loader takes no libraries from archives.
torch, which is gigabytes where it has CUDA, is by default left to the Python that runs the file.
"""

import argparse
import shutil
import subprocess
import sys
import warnings
from collections.abc import Collection
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SOURCE = Path(__file__).resolve().parent.parent
# In place of shiv's __main__.py, which unpacks without a look at Python's version and ends with a traceback.
MAIN = """\
import sys

if sys.version_info[:2] != {version}:
    sys.exit(
        "Error: this file was built for Python {version[0]}.{version[1]}, and %s is %d.%d; "
        "run it with the other: python{version[0]}.{version[1]} %s"
        % (sys.executable, sys.version_info[0], sys.version_info[1], sys.argv[0])
    )

import _bootstrap

unpack = _bootstrap.extract_site_packages


def unpack_or_say_why_not(archive, folder, *options):
    try:
        unpack(archive, folder, *options)
    except OSError as error:
        sys.exit("Error: this file unpacks itself into %s: %s; SHIV_ROOT can change that" % (folder, error))


_bootstrap.extract_site_packages = unpack_or_say_why_not
_bootstrap.bootstrap()
"""


def needed_distributions(requirement: str, *, without: Collection[str] = ()) -> dict[str, str]:
    """Name and version of what the installed `requirement` needs, itself included.

    without: distributions that are left out, with all that only they need. Raises PackageNotFoundError if
    something is not installed.
    """
    needed: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(requirement)]
    while left:
        asked = left.pop()
        name, extras = canonicalize_name(asked.name), frozenset(asked.extras)
        if name in without or (name, extras) in seen:
            continue
        seen.add((name, extras))
        found = distribution(name)
        needed[name] = found.version
        for line in found.requires or []:
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in {"", *extras}):
                left.append(inner)
    return needed


def build(output: Path, ucx: str, *, with_torch: bool) -> None:
    """Write the file. ucx: the extra of pdengine that brings libucx."""
    work = SOURCE / "build"
    shutil.rmtree(work, ignore_errors=True)  # setuptools would pack modules that were deleted since
    site_packages = work / "binary"
    without = () if with_torch else ("torch",)
    needed = needed_distributions(f"pdengine[{ucx}]", without=without)
    del needed["pdengine"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    pinned = [f"{name}=={version}" for name, version in sorted(needed.items())]
    subprocess.run([*install, "--target", str(site_packages), *pinned, str(SOURCE)], check=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Of the child processes PYTHONPATH makes the same program, whatever becomes of the file meanwhile.
    command = [sys.executable, "-m", "shiv", "--site-packages", str(site_packages)]
    command += ["--console-script", "pdengine", "--python", "/usr/bin/env python3", "--compressed"]
    command += ["--extend-pythonpath", "--output-file", str(output)]
    subprocess.run(command, check=True)
    with ZipFile(output, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the two files of that name Python takes the later one
        archive.writestr("__main__.py", MAIN.format(version=sys.version_info[:2]))
    print(f"{output}: {output.stat().st_size / 1e6:.0f} MB, {len(needed) + 1} packages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=SOURCE / "dist" / "pdengine")
    parser.add_argument("--ucx", choices=("cu12", "cu13"), default="cu12", help="which libucx goes in")
    parser.add_argument("--with-torch", action="store_true", help="put the installed torch in")
    arguments = parser.parse_args()
    build(arguments.output, arguments.ucx, with_torch=arguments.with_torch)


if __name__ == "__main__":
    main()
