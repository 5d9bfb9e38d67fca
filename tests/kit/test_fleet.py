"""What a fleet file leaves open, decided."""

from __future__ import annotations

from typing import Any

from hypothesis import given

from chatterbox_deploy import config, fleet
from support import fleets


def resolve(text: str) -> fleet.Fleet:
    return fleet.resolve(config.load(text, source="fleet.toml"))


def test_names_say_which_gpu_and_which_replica() -> None:
    resolved = resolve("""
[gpus]
0 = 6093
1 = [6094, 6096]
GPU-8f3c2a1b-0000-4000-8000-00000000000a = 6097
"2,3" = 6098
4 = [6099]
""")

    assert [(instance.name, instance.gpus, instance.port) for instance in resolved.instances] == [
        ("gpu0", ("0",), 6093),
        ("gpu1-a", ("1",), 6094),
        ("gpu1-b", ("1",), 6096),
        ("gpu-8f3c2a1b", ("GPU-8f3c2a1b-0000-4000-8000-00000000000a",), 6097),
        ("gpu2-gpu3", ("2", "3"), 6098),
        ("gpu4", ("4",), 6099),
    ]


def test_uuids_that_begin_alike_are_named_in_full() -> None:
    resolved = resolve("""
[gpus]
GPU-8f3c2a1b-0000-4000-8000-00000000000a = 6093
GPU-8f3c2a1b-0000-4000-8000-00000000000b = 6094
""")

    assert [instance.name for instance in resolved.instances] == [
        "gpu-8f3c2a1b-0000-4000-8000-00000000000a",
        "gpu-8f3c2a1b-0000-4000-8000-00000000000b",
    ]


def test_each_instance_sees_its_gpus_and_no_other() -> None:
    resolved = resolve('[gpus]\n1 = 6093\n"2,3" = 6094')

    assert [instance.environment["CUDA_VISIBLE_DEVICES"] for instance in resolved.instances] == ["1", "2,3"]
    assert {instance.environment["CUDA_DEVICE_ORDER"] for instance in resolved.instances} == {"PCI_BUS_ID"}


def test_a_servers_own_command_is_filled_in_and_told_nothing_of_ours() -> None:
    resolved = resolve("""
[gpus]
0 = 6093
1 = 6094
[server]
command = ["/srv/python", "api_server.py", "--bind={host}:{port}", "{{literal}}"]
directory = "/srv"
""")

    assert [instance.command[2:] for instance in resolved.instances] == [
        ("--bind=127.0.0.1:6093", "{literal}"),
        ("--bind=127.0.0.1:6094", "{literal}"),
    ]
    assert not [name for name in resolved.instances[0].environment if name.startswith("CHATTERBOX_")]
    assert not resolved.service.speaks_notify
    assert resolved.front.keepalive_connections == 0


def test_outer_timeouts_outlast_inner_ones() -> None:
    resolved = resolve("[gpus]\n0 = 6093\n[server]\nmax_wait_s = 100\nlongest_utterance_s = 1000")

    assert resolved.front.read_timeout_s > 1100
    # What waits is handed back at once.
    assert resolved.service.stop_timeout_s > 1000


def test_a_server_of_ones_own_may_finish_all_that_it_accepted() -> None:
    resolved = resolve(
        "[gpus]\n0 = 6093\n[server]\nmax_wait_s = 100\nlongest_utterance_s = 1000\ncommand = ['/srv/serve', '{port}']"
    )

    assert resolved.service.stop_timeout_s > 1100


def test_a_crash_loop_is_noticed_when_every_start_takes_a_minute_to_fail() -> None:
    service = resolve("[gpus]\n0 = 6093\n[unit]\nrestart_delay_s = 30\nrestart_limit = 4").service

    assert service.restart_window_s == 4 * (60 + 30)


def test_an_operators_variable_overrides_a_default() -> None:
    (instance,) = resolve("[gpus]\n0 = 6093\n[server.environment]\nOMP_NUM_THREADS = '8'").instances

    assert instance.environment["OMP_NUM_THREADS"] == "8"


@given(fleets.fleet_tables())
def test_every_instance_has_a_name_a_port_and_gpus_of_its_own(table: dict[str, Any]) -> None:
    instances = resolve(fleets.to_toml(table)).instances

    assert len({instance.name for instance in instances}) == len(instances)
    assert len({instance.port for instance in instances}) == len(instances)
    assert set(table["gpus"]) == {",".join(instance.gpus) for instance in instances}
