"""What nvidia-smi says, read; whether a fleet fits what it tells of."""

from __future__ import annotations

import pytest

from chatterbox_deploy import fleet
from chatterbox_deploy.change import observe
from chatterbox_deploy.change.ledger import Ledger
from chatterbox_deploy.config import reading
from chatterbox_deploy.gpu import query
from chatterbox_deploy.gpu.query import MEBIBYTE, Gpu
from chatterbox_deploy.sizing import capacity
from support.scripted import scripted_host

# The fields of ask_argv(); a board without memory of its own, and one in trouble.
SAID = """\
0, GPU-bc4d54bb-bb6a-bd83-0b29-536213c3eaf7, NVIDIA H200, 143771, 4521
1, GPU-0a1b2c3d-0000-0000-0000-000000000000, NVIDIA GB10, [N/A], [N/A]
Unable to determine the device handle for GPU2: 0000:04:00.0: Unknown Error
"""

H200 = Gpu("0", "GPU-bc4d54bb-bb6a-bd83-0b29-536213c3eaf7", "NVIDIA H200", 143771 * MEBIBYTE, 4521 * MEBIBYTE)
SMALL = Gpu("1", "GPU-0a1b2c3d-0000-0000-0000-000000000000", "a small one", 12 * 2**30, 0)


def test_what_nvidia_smi_prints_is_read_and_what_it_does_not_know_is_unknown() -> None:
    first, second = query.parse(SAID)

    assert first == H200
    assert (second.name, second.memory_bytes, second.used_bytes) == ("NVIDIA GB10", None, None)


def test_a_host_tells_its_gpus_and_cpus_or_that_it_does_not_know() -> None:
    with scripted_host() as host:
        assert (observe.gpus(host), observe.cpus(host)) == ((), None)
        host.gpus = SAID
        host.place("/sys/devices/system/cpu/online", "0-2,8\n")

        assert observe.gpus(host) == query.parse(SAID)
        assert observe.cpus(host) == frozenset({0, 1, 2, 8})


def problems(toml: str) -> list[str]:
    return capacity.problems(fleet.resolve(reading.load(toml, source="f")), [H200, SMALL], range(8))


@pytest.mark.parametrize(
    "toml",
    [
        "[gpus]\n0 = [6093, 6094, 6096, 6097]\n1 = [6098, 6099]\n",
        # By whatever name.
        f"[gpus]\n{SMALL.uuid} = [6093, 6094]\n",
        # It is known to need less.
        "[gpus]\n1 = [6093, 6094, 6096, 6097]\n[server]\ngpu_memory_mb = 3000\n",
        # Nobody knows: of a GPU that does not answer, of two, of another server, of a machine without.
        "[gpus]\n7 = [6093, 6094, 6096, 6097]\n",
        "[gpus]\n'0,1' = [6093, 6094, 6096, 6097]\n",
        "[gpus]\n1 = [6093, 6094, 6096, 6097]\n[server]\ncommand = ['/srv/x', '{port}']\n",
        "[gpus]\n1 = [6093, 6094, 6096, 6097]\n[server]\nengine = 'espeak'\n",
        "[gpus]\n0 = [6093, 6094]\n[unit]\ncpus_per_instance = 4\n",
    ],
)
def test_what_fits_or_may_fit_is_no_problem(toml: str) -> None:
    assert problems(toml) == []


def test_too_many_instances_for_a_gpus_memory_are_refused_with_the_number_that_it_holds() -> None:
    assert problems(f"[gpus]\n{SMALL.uuid} = [6093, 6094, 6096]\n") == [
        f"gpus.{SMALL.uuid}: 3 x 4.4 GB of GPU memory are more than its 12.9 GB, which hold 2; if an instance needs "
        "less, say so (server.gpu_memory_mb)"
    ]


def test_too_many_instances_for_the_cpus_are_refused() -> None:
    assert problems("[gpus]\n0 = [6093, 6094, 6096]\n[unit]\ncpus_per_instance = 3\n") == [
        "unit.cpus_per_instance: 3 x 3 CPUs are 0 to 8, and this machine has 8, up to 7"
    ]


def test_what_a_gpu_cannot_hold_is_found_before_anything_is_done() -> None:
    with scripted_host() as host:
        host.gpus = SAID.replace("143771", "8000")
        wanted = fleet.resolve(reading.load("[gpus]\n0 = [6093, 6094]\n", source="f"))

        state = observe.state(host, Ledger(), fleet=wanted)

        assert "nvidia-cuda-mps-control" in state.missing
        assert len(capacity.problems(wanted, state.gpus, state.cpus)) == 1
        host.place("/usr/bin/nvidia-cuda-mps-control")
        assert "nvidia-cuda-mps-control" not in observe.state(host, Ledger(), fleet=wanted).missing
