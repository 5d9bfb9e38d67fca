"""Apply and uninstall beside units and sites of others, on a real systemd and a real nginx: theirs stay as they are.

Under load: ``test_live_changes.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.sandbox import PYTHON

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.sandbox import Sandbox

pytestmark = pytest.mark.systemd

FLEET_TOML = "/etc/chatterbox-tts/fleet.toml"
TWO = '[gpus]\n0 = 6093\n1 = 6094\n[server]\nengine = "espeak"\nqueue_size = 100\n[unit]\nrecycle_after_h = 24\n'
GPU0, GPU1, FOREIGN_UNIT = (f"chatterbox-tts-{name}.service" for name in ("gpu0", "gpu1", "foo"))
UNITS, SITES = "/etc/systemd/system", "/etc/nginx/conf.d"
SITE = "server {{ listen 127.0.0.1:{port}; location / {{ return 200 'another site\\n'; }} }}\n"
SERVICE = "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"

OTHERS = {
    f"{SITES}/a-shop.conf": SITE.format(port=7001),
    # Names that we might give to files of ours; only the header tells.
    f"{SITES}/chatterbox-tts-shop.conf": SITE.format(port=7002),
    "/etc/nginx/sites-enabled/blog": SITE.format(port=7003),
    f"{UNITS}/shop.service": SERVICE,
    f"{UNITS}/{FOREIGN_UNIT}": SERVICE,
    f"{UNITS}/chatterbox-tts-gpu7.service": SERVICE,
    f"{UNITS}/chatterbox-tts-night.timer": "[Timer]\nOnCalendar=daily\n",
    f"{UNITS}/{GPU0}.d/nice.conf": "[Service]\nNice=5\n",
}
THEIR_SERVICES = ("shop.service", FOREIGN_UNIT, "chatterbox-tts-gpu7.service")

# Every file with its content, mode and owner, every link with its target, every directory.
LISTING = """
find /etc -path /etc/chatterbox-tts -prune -o -type f -printf '%p %m %U:%G ' -exec sh -c 'sha256sum < "$1"' _ {} \\; \
  -o -printf '%p %y %l\\n' | sort
"""

# Whatever bears our name, but for the kernel's views.
NAMED = "find / \\( -path /proc -o -path /sys \\) -prune -o -name '*chatterbox*' -print | sort"


def typed(sandbox: Sandbox, line: str) -> tuple[int, str]:
    """Exit status of a command, and what it wrote to both streams."""
    *said, status = sandbox.run(
        "sh", "-c", f"chatterbox-deploy {line} 2>&1; status=$?; echo; echo $status"
    ).splitlines()
    return int(status), "\n".join(said).strip("\n")


def listing(sandbox: Sandbox) -> list[str]:
    return sandbox.run("bash", "-c", LISTING).splitlines()


def lives(sandbox: Sandbox) -> list[str]:
    return [sandbox.show(unit, "InvocationID") for unit in THEIR_SERVICES]


def named(sandbox: Sandbox) -> list[str]:
    return sandbox.run("bash", "-c", NAMED).splitlines()


@pytest.fixture
def machine(boot: Callable[[], Sandbox]) -> Iterator[Sandbox]:
    """A host with sites and services of others that run, and a fleet file; the tool has an environment of its own."""
    sandbox = boot()
    for path, text in OTHERS.items():
        sandbox.write(path, text)
    sandbox.write(FLEET_TOML, TWO)
    sandbox.run(
        "bash",
        "-euc",
        f"""
        mkdir -p /opt/chatterbox-tts/versions
        cp -a /opt/chatterbox-tts/venv /opt/tool
        mv /opt/chatterbox-tts/venv /opt/chatterbox-tts/versions/first
        ln -s versions/first /opt/chatterbox-tts/venv
        sed -i s,{PYTHON},/opt/tool/bin/python, /usr/local/bin/chatterbox-deploy
        systemctl daemon-reload
        systemctl enable --now {" ".join(THEIR_SERVICES)} nginx.service
        """,
    )
    yield sandbox
    for port in (7001, 7002, 7003):
        assert sandbox.run("curl", "-sS", f"http://127.0.0.1:{port}/") == "another site\n"


def test_what_others_wrote_is_the_same_after_install_change_and_uninstall(machine: Sandbox) -> None:
    before, named_before, running = listing(machine), named(machine), lives(machine)

    planned = typed(machine, f"plan {FLEET_TOML}")
    applied = typed(machine, f"apply {FLEET_TOML}")
    again = typed(machine, f"plan {FLEET_TOML}")
    machine.write(FLEET_TOML, TWO.replace("1 = 6094", "2 = 6094"))
    changed = typed(machine, f"apply {FLEET_TOML}")
    during = listing(machine)
    removed = typed(machine, "uninstall --purge --yes")

    assert planned[0] == 1
    assert f"+++ b{UNITS}/{GPU0}\n" in planned[1]
    assert "gpu0  it is new\ngpu1  it is new\n" in planned[1]
    assert applied[0] == 0, applied[1]
    assert again == (0, "nothing to do: the host is as the fleet file says")
    assert changed[0] == 0, changed[1]
    assert set(before) < set(during)
    assert removed[0] == 0, removed[1]
    assert listing(machine) == before
    assert lives(machine) == running
    # The test's own: nothing but our versions was there.
    assert set(named_before) - set(named(machine)) == {"/opt/chatterbox-tts"}
    assert sorted(set(named(machine)) - set(named_before)) == []
    # Gone from systemd, too; what is there of them is a drop-in of somebody else's.
    loaded = machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "chatterbox-tts*").split("\n")
    assert {line.split()[0] for line in loaded if line} <= {*THEIR_SERVICES, "chatterbox-tts-night.timer"}
    print(f"{len(before)} files of /etc are byte for byte what they were; nothing is left of ours")


def test_uninstalled_without_purge_voices_versions_and_the_history_stay(machine: Sandbox) -> None:
    before = listing(machine)
    typed(machine, f"apply {FLEET_TOML}")
    machine.run("sh", "-c", "echo voice > /var/lib/chatterbox-tts/voices/ada.wav")

    removed = typed(machine, "uninstall")

    assert removed[0] == 0, removed[1]
    assert listing(machine) == before
    assert machine.run("cat", "/var/lib/chatterbox-tts/voices/ada.wav") == "voice\n"
    assert machine.run("readlink", "/opt/chatterbox-tts/venv") == "versions/first\n"
    assert "chatterbox-deploy apply" in typed(machine, "history")[1]
    applied = typed(machine, f"apply {FLEET_TOML}")
    assert applied[0] == 0, applied[1]
    assert machine.run("cat", "/var/lib/chatterbox-tts/voices/ada.wav") == "voice\n"


@pytest.mark.parametrize(
    ("path", "text"),
    [(f"{UNITS}/{GPU1}", SERVICE), (f"{SITES}/chatterbox-tts.conf", SITE.format(port=7004))],
    ids=["unit", "site"],
)
def test_where_a_file_of_others_stands_in_our_place_nothing_is_begun(machine: Sandbox, path: str, text: str) -> None:
    machine.write(path, text)
    before = listing(machine)

    planned, applied = typed(machine, f"plan {FLEET_TOML}"), typed(machine, f"apply {FLEET_TOML}")

    for status, said in (planned, applied):
        assert status == 3
        assert f"{path}: chatterbox-deploy did not write it, and writes over nothing of others; move it away" in said
    assert listing(machine) == before
    assert machine.run("sh", "-c", "ls -d /var/lib/chatterbox-deploy /run/chatterbox-deploy* || :") == ""


def test_a_site_that_nginx_refuses_beside_ours_changes_nothing(machine: Sandbox) -> None:
    typed(machine, f"apply {FLEET_TOML}")
    machine.write(f"{SITES}/broken.conf", "server { listen 127.0.0.1:7009; no_such_directive; }\n")
    before, first = listing(machine), machine.show(GPU0, "InvocationID")
    machine.write(FLEET_TOML, TWO.replace("100", "101"))

    status, said = typed(machine, f"apply {FLEET_TOML}")

    machine.run("rm", f"{SITES}/broken.conf")
    assert status == 3
    assert "cannot begin: nginx refuses its files, and not for ours; nothing was changed" in said
    assert 'unknown directive "no_such_directive" in /etc/nginx/conf.d/broken.conf' in said
    assert [line for line in before if "broken.conf" not in line] == listing(machine)
    assert machine.show(GPU0, "InvocationID") == first
    assert typed(machine, f"apply {FLEET_TOML}")[0] == 0
    assert "CHATTERBOX_QUEUE_SIZE=101" in machine.run("cat", f"/proc/{machine.show(GPU0, 'MainPID')}/environ")


def test_a_unit_of_ours_that_was_edited_by_hand_is_shown_and_kept_but_for_force(machine: Sandbox) -> None:
    before = listing(machine)
    typed(machine, f"apply {FLEET_TOML}")
    unit = f"{UNITS}/{GPU0}"
    machine.run("sed", "-i", "s/QUEUE_SIZE=100/QUEUE_SIZE=7/", unit)
    edited = machine.run("cat", unit)

    kept = typed(machine, "uninstall")

    assert kept[0] == 0, kept[1]
    assert "\n-Environment=CHATTERBOX_QUEUE_SIZE=100\n+Environment=CHATTERBOX_QUEUE_SIZE=7\n" in kept[1]
    assert f"kept: {unit} was edited by hand; --force removes it, too" in kept[1]
    assert machine.run("cat", unit) == edited
    assert [line for line in listing(machine) if f"{unit} " not in line] == before
    assert machine.show(GPU1, "LoadState") == "not-found"

    forced = typed(machine, "uninstall --force")

    assert forced[0] == 0, forced[1]
    assert listing(machine) == before
    assert machine.show(GPU0, "ActiveState") == "inactive"


def test_an_instance_that_runs_a_unit_edited_by_hand_restarts_with_the_fleets_own(machine: Sandbox) -> None:
    typed(machine, f"apply {FLEET_TOML}")
    machine.run("sed", "-i", "s/QUEUE_SIZE=100/QUEUE_SIZE=7/", f"{UNITS}/{GPU0}")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", GPU0)
    other = machine.show(GPU1, "InvocationID")

    status, said = typed(machine, f"apply {FLEET_TOML}")

    assert status == 0, said
    assert "CHATTERBOX_QUEUE_SIZE=100" in machine.run("cat", f"/proc/{machine.show(GPU0, 'MainPID')}/environ")
    assert machine.show(GPU1, "InvocationID") == other
    assert typed(machine, f"plan {FLEET_TOML}")[0] == 0
