"""What we build, installed as a stranger would: beside the kit's declared dependencies and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from build import ProjectBuilder
from packaging.requirements import Requirement

from chatterbox_deploy.bench import loads
from support import golden

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[2]
CASE = "two-gpus"
TEMPLATES = sorted(
    path.relative_to(ROOT).as_posix() for folder in ("units", "nginx") for path in (ROOT / folder).glob("*.j2")
)

CAPTURE = ROOT / "docs/report/two-rtx-3090.xml"

WHERE = """
import chatterbox_deploy.templates
print(chatterbox_deploy.__file__)
print(chatterbox_deploy.templates.shipped())
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree that the sdist holds."""
    folder = tmp_path_factory.mktemp("unpacked")
    subprocess.run(("tar", "--extract", "--file", sdist, "--directory", folder), check=True)
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheels(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each way to install us; pip installs from a checkout by way of an "editable" wheel."""
    return {
        "wheel": _build(ROOT, "wheel", tmp_path_factory.mktemp("wheel")),
        "wheel from sdist": _build(unpacked, "wheel", tmp_path_factory.mktemp("wheel-from-sdist")),
        "editable": _build(ROOT, "editable", tmp_path_factory.mktemp("editable")),
    }


@pytest.fixture(scope="module")
def kit_dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the kit requires without any extra: links to this environment's own copies."""
    folder = tmp_path_factory.mktemp("kit-dependencies")
    for name in _required_by("chatterbox-deploy"):
        distribution = metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files or ()} - {".."}:
            if not (folder / entry).exists():
                (folder / entry).symlink_to(str(distribution.locate_file(entry)))
    return folder


@pytest.mark.parametrize("way", ["wheel", "wheel from sdist", "editable"])
def test_every_way_to_install_us_renders_the_golden_files(
    way: str, wheels: dict[str, Path], kit_dependencies: Path, tmp_path: Path
) -> None:
    python = _install(wheels[way], kit_dependencies, tmp_path / "venv")
    fleet_file = tmp_path / "fleet.toml"
    fleet_file.write_bytes((golden.FOLDER / CASE / "fleet.toml").read_bytes())

    where, templates = _run(python, "-c", WHERE, cwd=tmp_path).splitlines()
    _run(python.with_name("chatterbox-deploy"), "render", fleet_file, "--output", tmp_path / "out", cwd=tmp_path)

    # Of a report the page, without matplotlib; status 1 is its finding that a GPU is idle.
    told = f"{python.with_name('chatterbox-deploy')} report --format html --from-nvidia-smi {CAPTURE}; test $? -eq 1"
    assert "pip install '.[plots]'" in _run("sh", "-c", told, cwd=tmp_path)

    ours = ROOT / "src" if way == "editable" else tmp_path / "venv"
    assert Path(where).is_relative_to(ours)
    assert Path(templates).is_relative_to(ROOT if way == "editable" else tmp_path / "venv")
    assert _tree(tmp_path / "out") == {
        path: text.replace(golden.SOURCE, str(fleet_file))
        for path, text in _tree(golden.FOLDER / CASE / "rendered").items()
    }


def test_the_kit_alone_brings_neither_torch_nor_a_web_framework(kit_dependencies: Path) -> None:
    linked = {path.name for path in kit_dependencies.iterdir()}

    assert linked >= {"click", "jinja2", "pydantic", "rich"}
    assert not linked & {"chatterbox", "fastapi", "numpy", "av", "starlette", "torch", "uvicorn"}


def test_the_wheel_holds_all_that_is_not_python(wheels: dict[str, Path]) -> None:
    names = zipfile.ZipFile(wheels["wheel"]).namelist()

    assert TEMPLATES
    assert set(names) >= {f"chatterbox_deploy/_templates/{template}" for template in TEMPLATES}
    assert set(names) >= {"chatterbox_deploy/fleet.schema.json", "chatterbox_deploy/py.typed"}
    assert "chatterbox_deploy/report/page.html.j2" in names
    assert set(names) >= {f"chatterbox_deploy/monitoring/{name}.yml.j2" for name in ("rules", "scrape")}
    assert set(names) >= {f"chatterbox_deploy/bench/texts/{name}.txt" for name in loads.TEXT_SETS}
    assert [name for name in names if name.endswith("/licenses/LICENSE")]


def test_the_sdist_holds_the_templates_where_an_operator_looks_for_them(unpacked: Path) -> None:
    assert TEMPLATES
    assert [template for template in TEMPLATES if not (unpacked / template).is_file()] == []


def test_the_wheel_is_the_same_from_the_checkout_and_from_the_sdist(wheels: dict[str, Path]) -> None:
    assert _contents(wheels["wheel"]) == _contents(wheels["wheel from sdist"])


def _build(source: Path, kind: str, output: Path) -> Path:
    # Without isolation: the backend is the one that scripts/constraints pins, and no index is asked.
    return Path(ProjectBuilder(source).build(kind, output))  # type: ignore[arg-type]  # takes a Literal


def _required_by(name: str) -> set[str]:
    """Names of all distributions that ``name`` needs without extras, direct or not."""
    found: set[str] = set()
    to_do = [name]
    while to_do:
        for line in metadata.requires(to_do.pop()) or ():
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and requirement.name not in found:
                found.add(requirement.name)
                to_do.append(requirement.name)
    return found


def _install(wheel: Path, dependencies: Path, folder: Path) -> Path:
    """A new environment's Python, with ``wheel`` installed and ``dependencies`` importable."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return python


def _run(*argv: str | Path, cwd: Path) -> str:
    # Without our own PYTHON* variables, and away from the checkout: only what is installed can be imported.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _tree(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in _files(root)}


def _files(root: Path) -> Iterable[Path]:
    return (path for path in root.rglob("*") if path.is_file())


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
