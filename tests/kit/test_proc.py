"""What Linux tells of a process; what a process is; where code names a GPU."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from chatterbox_deploy.report import pins, proc
from support.situations import card

# As systemd 252 and 257 lay them out; the old hierarchy of several trees; a container.
CGROUPS = {
    "0::/system.slice/chatterbox-tts-gpu0.service\n": "chatterbox-tts-gpu0.service",
    "0::/system.slice/system-tts.slice/tts@1.service\n": "tts@1.service",
    "0::/user.slice/user-1000.slice/user@1000.service/app.slice/tts.service\n": "tts.service",
    "0::/user.slice/user-1000.slice/session-3.scope\n": None,
    "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-terminal.scope\n": None,
    "12:cpuset:/\n5:devices:/system.slice/tts.service\n1:name=systemd:/system.slice/tts.service\n": "tts.service",
    "0::/system.slice/docker-3f1c.scope\n": None,
    "0::/system.slice/dev\\x2ddisk.service\n": "dev-disk.service",
    "0::/\n": None,
    "": None,
}


@pytest.mark.parametrize(("cgroup", "unit"), CGROUPS.items())
def test_the_unit_of_a_process_is_read_from_its_cgroup(cgroup: str, unit: str | None) -> None:
    assert proc.unit_of(cgroup) == unit


def test_command_lines_and_environments_are_split_where_linux_ends_words() -> None:
    assert proc.words(b"python\0-m\0chatterbox_server\0") == ("python", "-m", "chatterbox_server")
    assert proc.words(b"") == ()
    assert proc.variables(b"CUDA_VISIBLE_DEVICES=1\0A=b=c\0junk\0EMPTY=\0") == {
        "CUDA_VISIBLE_DEVICES": "1", "A": "b=c", "EMPTY": "",
    }  # fmt: skip


def test_cpu_time_is_read_whatever_the_process_is_called() -> None:
    numbers = " ".join(map(str, range(4, 53)))

    assert proc.cpu_ticks(f"812 (python3) S {numbers}\n") == 14 + 15
    assert proc.cpu_ticks(f"812 (a) R (b) S {numbers}\n") == 14 + 15
    assert proc.cpu_ticks("") is None


@pytest.mark.parametrize(
    ("argv", "unit", "gpu_kind", "code", "kind"),
    [
        (("/opt/venv/bin/python", "-m", "chatterbox_server"), "chatterbox-tts-gpu0.service", "C", "", "instance"),
        (("/opt/venv/bin/python", "-m", "chatterbox_server"), None, "C", "", "speech"),
        (("nvidia-cuda-mps-server",), None, "C", "", "mps"),
        (("/usr/bin/nvidia-cuda-mps-control", "-f"), "chatterbox-tts-mps-gpu1.service", None, "", "mps"),
        (("python3", "/srv/tts/api_server.py"), None, "C", "", "speech"),
        (("python3", "serve.py"), None, "C", "from chatterbox.tts import ChatterboxTTS\n", "speech"),
        (("python3", "serve.py"), "my-tts.service", "C", "", "speech"),
        (("uvicorn", "kokoro_api:app"), None, "C", "", "speech"),
        (("/opt/chatterbox-deploy/venv/bin/python", "my_tts.py"), None, "C", "", "speech"),
        (("/opt/chatterbox-deploy/venv/bin/python", "train.py"), None, "C", "", "other"),
        (("python3", "train.py"), None, "C", "import torch\n", "other"),
        (("/usr/lib/xorg/Xorg", ":0"), "display-manager.service", "G", "", "display"),
        (("/usr/bin/gnome-shell",), None, "C+G", "", "display"),
        (("some-game",), None, "G", "", "display"),
        # Nobody may know its command line.
        ((), None, "C", "", None),
        # No server, though the words are in it.
        (("vim", "tts.py"), None, None, "", "other"),
        (("python3", "-m", "chatterbox_deploy", "report"), None, None, "", "other"),
        (("python3", "/usr/bin/chatterbox-deploy", "monitor"), None, None, "", "other"),
        (("python3", "attsv.py"), None, "C", "", "other"),
    ],
)
def test_a_process_is_recognised(
    argv: tuple[str, ...], unit: str | None, gpu_kind: str | None, code: str, kind: str | None
) -> None:
    assert proc.recognise(argv, unit=unit, marked=False, gpu_kind=gpu_kind, name=None, code=code) == kind


def test_a_process_with_the_mark_of_our_units_is_an_instance() -> None:
    assert proc.recognise(("x",), unit=None, marked=True, gpu_kind=None, name=None) == "instance"


@pytest.mark.parametrize(
    ("argv", "paths"),
    [
        (("python3", "api.py", "--port", "1"), ["/srv/api.py"]),
        (("/opt/venv/bin/python3.11", "-u", "/opt/api.py"), ["/opt/api.py"]),
        (("/usr/bin/uvicorn", "app.main:app", "--host", "::"), ["/srv/app/main.py"]),
        (("python3", "/usr/bin/uvicorn", "main:app"), ["/srv/main.py"]),
        (("python3", "-m", "chatterbox_server"), []),
        (("vim", "api.py"), []),
        ((), []),
    ],
)
def test_code_is_found_by_the_command_line(argv: tuple[str, ...], paths: list[str]) -> None:
    assert [str(path) for path in proc.script_paths(argv, PurePosixPath("/srv"))] == paths


def test_without_its_directory_only_absolute_paths_are_known() -> None:
    assert proc.script_paths(("python3", "api.py", "/opt/b.py"), None) == [PurePosixPath("/opt/b.py")]


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ('model = ChatterboxTTS.from_pretrained(device="cuda:0")', "cuda:0"),
        ("model.to('cuda:1')", "cuda:1"),
        ('d = f"cuda:{int(os.environ[\'CUDA_VISIBLE_DEVICES\'])}"', "cuda:{int(os.environ['CUDA_VISIBLE_DEVICES'])}"),
        ('device = f"cuda:{gpu}"', "cuda:{gpu}"),
        ("model.cuda(1)", "cuda:1"),
        ("torch.cuda.set_device(0)", "cuda:0"),
        ('torch.cuda.set_device("cuda:1")', "cuda:1"),
        ('os.environ["CUDA_VISIBLE_DEVICES"] = "0"', "CUDA_VISIBLE_DEVICES=0"),
        ("os.environ.setdefault('CUDA_VISIBLE_DEVICES', '1')", "CUDA_VISIBLE_DEVICES=1"),
        ('device = "cuda" if torch.cuda.is_available() else "cpu"', None),
        ("model.cuda()", None),
        ('# was "cuda:0"', None),
        ('print(os.environ["CUDA_VISIBLE_DEVICES"])', None),
        ("name = torch.cuda.get_device_name(0)", None),
    ],
)  # fmt: skip
def test_code_that_names_a_gpu_is_found(line: str, device: str | None) -> None:
    found = pins.find(f"import torch\n    {line}\n", "/srv/api.py")

    assert [each.device for each in found] == ([] if device is None else [device])
    assert all((each.number, each.text) == (2, line) for each in found)


@pytest.mark.parametrize(
    ("visible", "index"),
    [("0", "0"), (" 1 ", "1"), ("GPU-00000001-0000-0000-0000-000000000000", "1"), ("GPU-00000001", "1"),
     ("0,1", None), ("", None), ("-1", None), ("7", None), ("GPU-", None), ("all", None)],
)  # fmt: skip
def test_the_one_gpu_that_a_variable_leaves_is_known_by_number_or_uuid(visible: str, index: str | None) -> None:
    assert pins.pinned_to(visible, [card(0), card(1)]) == index
