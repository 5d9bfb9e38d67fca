"""What a fleet file leaves open, decided."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from chatterbox_deploy import fleet
from chatterbox_deploy.config import reading
from chatterbox_deploy.errors import UnknownInstance
from support import fleets


def resolve(text: str) -> fleet.Fleet:
    return fleet.resolve(reading.load(text, source="fleet.toml"))


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


def test_memory_and_age_have_no_limit_unless_one_is_given() -> None:
    free = resolve("[gpus]\n0 = 6093").service
    bounded = resolve(
        "[gpus]\n0 = 6093\n[unit]\nmemory_max_mb = 8000\nrecycle_after_h = 24\nrecycle_memory_mb = 6000"
    ).service

    assert (free.memory_max_bytes, free.recycle_after_h, free.recycle_memory_mb) == (None, None, None)
    assert not free.recycles
    assert bounded.memory_max_bytes == 8_000_000_000
    assert (bounded.recycle_after_h, bounded.recycle_memory_mb) == (24, 6000)
    assert bounded.recycles


SHARED = "[gpus]\n0 = 6093\n1 = [6094, 6096]\n'2,3' = [6097, 6098]\n4 = [6099]\n"


def test_each_gpu_with_several_instances_has_an_mps_daemon_and_they_its_pipes() -> None:
    resolved = resolve(SHARED)

    assert {daemon.name: daemon.gpus for daemon in resolved.mps_daemons} == {
        "mps-gpu1": ("1",),
        "mps-gpu2-gpu3": ("2", "3"),
    }
    assert {each.name: each.environment.get("CUDA_MPS_PIPE_DIRECTORY") for each in resolved.instances} == {
        "gpu0": None,
        "gpu1-a": "/run/chatterbox-tts-mps-gpu1",
        "gpu1-b": "/run/chatterbox-tts-mps-gpu1",
        "gpu2-gpu3-a": "/run/chatterbox-tts-mps-gpu2-gpu3",
        "gpu2-gpu3-b": "/run/chatterbox-tts-mps-gpu2-gpu3",
        "gpu4": None,
    }
    assert len({daemon.environment["CUDA_MPS_LOG_DIRECTORY"] for daemon in resolved.mps_daemons}) == 2


@pytest.mark.parametrize("more", ["[unit]\nmps = false", "[server]\nengine = 'espeak'", "[server]\ndevice = 'cpu'"])
def test_without_cuda_or_where_the_file_says_so_there_is_no_mps(more: str) -> None:
    resolved = resolve(SHARED + more)

    assert resolved.mps_daemons == ()
    assert all(each.mps is None and "CUDA_MPS_PIPE_DIRECTORY" not in each.environment for each in resolved.instances)


def test_a_share_of_the_gpu_is_told_to_those_who_share_it_alone() -> None:
    resolved = resolve(SHARED + "[unit]\nmps_thread_percentage = 40")

    told = {each.name: each.environment.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") for each in resolved.instances}
    assert told == {
        **dict.fromkeys(["gpu1-a", "gpu1-b", "gpu2-gpu3-a", "gpu2-gpu3-b"], "40"),
        "gpu0": None,
        "gpu4": None,
    }


def test_cpus_are_dealt_out_in_the_files_order_and_bound_the_threads() -> None:
    resolved = resolve(SHARED + "[unit]\ncpus_per_instance = 3\n[server]\ncpu_threads = 8")

    assert [each.cpus for each in resolved.instances] == [range(3 * n, 3 * n + 3) for n in range(6)]
    assert {each.environment["OMP_NUM_THREADS"] for each in resolved.instances} == {"3"}
    assert all(each.cpus is None for each in resolve(SHARED).instances)


def test_the_memory_of_an_instance_is_as_given_as_measured_or_unknown() -> None:
    def needed(server: str) -> int | None:
        return resolve(f"[gpus]\n0 = 6093\n[server]\n{server}").service.gpu_memory_bytes

    assert needed("gpu_memory_mb = 2500") == 2_500_000_000
    assert needed("model = 'turbo'") == fleet.GPU_MEMORY_BYTES["turbo"]
    assert needed("engine = 'espeak'") is None
    assert needed("command = ['/srv/serve', '{port}']") is None
    assert needed("command = ['/srv/serve', '{port}']\ngpu_memory_mb = 2500") == 2_500_000_000


def test_an_operators_variable_overrides_a_default() -> None:
    (instance,) = resolve("[gpus]\n0 = 6093\n[server.environment]\nOMP_NUM_THREADS = '8'").instances

    assert instance.environment["OMP_NUM_THREADS"] == "8"


@given(fleets.fleet_tables())
def test_every_instance_has_a_name_a_port_and_gpus_of_its_own(table: dict[str, Any]) -> None:
    instances = resolve(fleets.to_toml(table)).instances

    assert len({instance.name for instance in instances}) == len(instances)
    assert len({instance.port for instance in instances}) == len(instances)
    assert set(table["gpus"]) == {",".join(instance.gpus) for instance in instances}


FOUND = [
    ("0", ["gpu0"]),
    ("gpu0", ["gpu0"]),
    ("GPU0", ["gpu0"]),
    ("1", ["gpu1-a", "gpu1-b"]),
    ("gpu1", ["gpu1-a", "gpu1-b"]),
    ("gpu1-b", ["gpu1-b"]),
    ("2", ["gpu2-gpu3"]),
    ("gpu3", ["gpu2-gpu3"]),
    ("2,3", ["gpu2-gpu3"]),
    ("gpu2-gpu3", ["gpu2-gpu3"]),
    ("gpu-8f3c2a1b", ["gpu-8f3c2a1b"]),
    ("GPU-8f3c2a1b-0000-4000-8000-00000000000a", ["gpu-8f3c2a1b"]),
]


@pytest.mark.parametrize(("who", "names"), FOUND)
def test_an_instance_is_found_by_its_name_and_by_any_gpu_of_its_own(who: str, names: list[str]) -> None:
    resolved = resolve("""
[gpus]
0 = 6093
1 = [6094, 6096]
GPU-8f3c2a1b-0000-4000-8000-00000000000a = 6097
"2,3" = 6098
""")

    assert [instance.name for instance in fleet.find(resolved, who)] == names


@pytest.mark.parametrize("who", ["7", "gpu7", "", "gpu", "0,1", "gpu1-c"])
def test_an_instance_that_is_not_there_is_answered_with_those_that_are(who: str) -> None:
    with pytest.raises(UnknownInstance) as caught:
        fleet.find(resolve("[gpus]\n0 = 6093\n1 = [6094, 6096]"), who)

    assert str(caught.value) == f"cannot find instance {who!r}; the fleet has gpu0, gpu1-a, gpu1-b"


@given(fleets.fleet_tables())
def test_any_name_finds_its_instance_alone_and_any_gpu_those_that_use_it(table: dict[str, Any]) -> None:
    resolved = resolve(fleets.to_toml(table))

    for instance in resolved.instances:
        assert fleet.find(resolved, instance.name) == (instance,)
        for gpu in instance.gpus:
            assert fleet.find(resolved, gpu) == tuple(other for other in resolved.instances if gpu in other.gpus)
