"""The rendered files: golden, judged by systemd itself, and the same every time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings

from chatterbox_deploy import fleet, render, systemd
from chatterbox_deploy.config import reading
from chatterbox_deploy.errors import TemplateError
from chatterbox_deploy.host import LocalHost
from chatterbox_deploy.templates import Templates, read_own
from support import certificates, fleets, golden

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.render import RenderedFile

NEEDS_SYSTEMD = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
SHIPPED_UNITS = Path("/usr/lib/systemd/system")


@pytest.mark.parametrize("case", golden.CASES)
def test_a_fleet_renders_to_its_golden_files(case: str) -> None:
    files = golden.render_case(case)
    if os.environ.get("UPDATE_GOLDEN"):
        shutil.rmtree(golden.FOLDER / case / "rendered", ignore_errors=True)
        LocalHost(golden.FOLDER / case / "rendered").write_files(files)

    assert {file.path: file.text for file in files} == golden.on_disk(case)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system for ``systemd-analyze verify``: systemd's own units and the programs that ours start."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(SHIPPED_UNITS, root / "usr/lib/systemd/system", symlinks=True)
    (root / "lib").symlink_to("usr/lib")
    for program in ("bin/sh", "bin/kill", "usr/bin/env", "usr/bin/systemctl"):
        place_program(root, f"/{program}")
    return root


def place_program(root: Path, path: str) -> None:
    program = root / path.lstrip("/")
    program.parent.mkdir(parents=True, exist_ok=True)
    program.touch(mode=0o755)


def systemd_says(root: Path, files: Sequence[RenderedFile]) -> str:
    """What ``systemd-analyze verify`` has against the units: nothing is the only good answer (it exits 0 on typos)."""
    units = [file for file in files if file.path.parent == render.UNIT_DIR]
    shutil.rmtree(root / "etc", ignore_errors=True)
    LocalHost(root).write_files(units)
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={root}", *(unit.path.name for unit in units)],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stderr + said.stdout + (f"exit status {said.returncode}" if said.returncode else "")


@NEEDS_SYSTEMD
@pytest.mark.parametrize("case", golden.CASES)
def test_systemd_has_nothing_to_say_about_any_golden_unit(case: str, tree: Path) -> None:
    for instance in golden.resolve(case).instances:
        place_program(tree, instance.command[0])

    assert systemd_says(tree, golden.render_case(case)) == ""


@NEEDS_SYSTEMD
def test_systemd_would_say_something_about_a_misspelt_key(tree: Path) -> None:
    files = golden.render_case("one-gpu")
    place_program(tree, "/opt/chatterbox-tts/venv/bin/python")
    misspelt = [render.RenderedFile(file.path, file.text.replace("WatchdogSec=", "WatchDogSec=")) for file in files]

    assert "WatchDogSec" in systemd_says(tree, misspelt)


@NEEDS_SYSTEMD
@pytest.mark.parametrize("case", golden.CASES)
def test_every_unit_is_hardened_as_far_as_cuda_allows(case: str, tmp_path: Path) -> None:
    LocalHost(tmp_path).write_files(golden.render_case(case))
    for unit in sorted((tmp_path / "etc/systemd/system").glob("*.service")):
        said = subprocess.run(
            ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=30", unit],
            capture_output=True,
            text=True,
            check=False,
        )
        exposure = re.search(r"Overall exposure level for \S+: (\S+)", said.stdout)

        assert exposure is not None, said.stderr
        assert said.returncode == 0, f"{unit.name}: {exposure[1]}"
        # Recycling is root's work: nginx's files, other processes' environments, systemd. So is looking, at GPUs too.
        assert float(exposure[1]) <= (3.0 if unit.name in (systemd.RECYCLE_UNIT, systemd.MONITOR_UNIT) else 2.5)


FORBIDDEN = ("PrivateDevices=yes", "MemoryDenyWriteExecute=yes", "ProcSubset=pid", "Requires=", "BindsTo=")


@pytest.mark.parametrize("case", golden.CASES)
def test_no_unit_of_an_instance_has_what_breaks_cuda_or_ties_gpus_together(case: str) -> None:
    for file in golden.render_case(case):
        if "\nDynamicUser=yes\n" in file.text:
            assert not [line for line in file.text.splitlines() if line.startswith(FORBIDDEN)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(table=fleets.fleet_tables())
def test_any_valid_fleet_renders_the_same_twice_and_has_a_unit_per_instance(table: dict[str, Any]) -> None:
    resolved = fleet.resolve(reading.load(fleets.to_toml(table), source="f"))

    files = render.render(resolved, Templates(), source="/etc/fleet.toml")

    assert files == render.render(resolved, Templates(), source="/etc/fleet.toml")
    assert all(render.is_ours(file.text) for file in files)
    assert {file.path.name for file in files} == {
        *(systemd.unit_name(instance.name) for instance in resolved.instances),
        systemd.TARGET,
        systemd.FRONT_UNIT,
        *([systemd.NODES_UNIT] if resolved.service.uses_gpu else []),
        *(systemd.unit_name(daemon.name) for daemon in resolved.mps_daemons),
        *([systemd.RECYCLE_UNIT, systemd.RECYCLE_TIMER] if resolved.service.recycles else []),
        render.FRONT_PATH.name,
        *(Path(path).name for path in resolved.monitoring.files),
        *([systemd.MONITOR_UNIT] if resolved.monitoring.textfile else []),
    }
    target = next(file.text for file in files if file.path.name == systemd.TARGET)
    assert all(f"Wants={systemd.unit_name(instance.name)}\n" in target for instance in resolved.instances)


@NEEDS_SYSTEMD
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(table=fleets.fleet_tables())
def test_systemd_has_nothing_to_say_about_any_valid_fleet(table: dict[str, Any], tree: Path) -> None:
    resolved = fleet.resolve(reading.load(fleets.to_toml(table), source="f"))
    shutil.rmtree(tree / "programs", ignore_errors=True)
    place_program(tree, resolved.instances[0].command[0])

    assert systemd_says(tree, render.render(resolved, Templates(), source="/etc/fleet.toml")) == ""


@pytest.mark.nginx
@pytest.mark.parametrize("case", golden.CASES)
def test_nginx_has_nothing_to_say_about_any_golden_front(case: str, tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("needs nginx (apt-get install nginx)")
    text = golden.on_disk(case)[render.FRONT_PATH]
    (tmp_path / "api-keys").write_text('"~^Bearer key$" ada;\n')
    certificates.self_signed(tmp_path / "fullchain.pem", tmp_path / "privkey.pem", "tts.example.com")
    for there in ("/var/log/nginx", "/etc/chatterbox-tts", "/etc/letsencrypt/live/tts.example.com"):
        text = text.replace(there, str(tmp_path))
    (tmp_path / "front.conf").write_text(text)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ include {tmp_path}/front.conf; }}"
    )

    said = subprocess.run(
        [nginx, "-t", "-q", "-e", "stderr", "-p", tmp_path, "-c", tmp_path / "nginx.conf"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (said.returncode, said.stderr) == (0, "")


def test_a_strange_file_name_cannot_break_out_of_the_header() -> None:
    assert render.header("/tmp/x\nExecStart=/bin/evil").count("\n") == 1


def test_the_operators_own_template_replaces_ours_and_the_rest_stay(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    (tmp_path / "units/chatterbox-tts.target.j2").write_text("{{ header }}\n# {{ fleet.instances | length }} of mine\n")

    files = render.render(golden.resolve("two-gpus"), Templates(read_own(tmp_path)), source=golden.SOURCE)

    changed = {file.path.name for file in files if golden.on_disk("two-gpus")[file.path] != file.text}
    assert changed == {"chatterbox-tts.target"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{{ fleet.nothing }}",
            "cannot fill in template units/chatterbox-tts.target.j2: .* has no attribute 'nothing'",
        ),
        ("a\n{% if %}", r"cannot read template .*chatterbox-tts.target.j2, line 2: "),
        ("{{ 1 // 0 }}", "cannot fill in template units/chatterbox-tts.target.j2: integer division"),
        ("{% include 'x' %}", "cannot find template x"),
    ],
)
def test_a_broken_template_is_named_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    (tmp_path / "units/chatterbox-tts.target.j2").write_text(text)

    with pytest.raises(TemplateError, match=said):
        render.render(golden.resolve("one-gpu"), Templates(read_own(tmp_path)), source=golden.SOURCE)


def test_a_directory_without_templates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="holds neither units/ nor nginx/"):
        Templates(read_own(tmp_path))
