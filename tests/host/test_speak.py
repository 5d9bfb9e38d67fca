"""``speak`` before a fleet: real nginx, and behind it espeak-ng, or servers that take the same time for each piece."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import pytest

from host import fixed_time_server
from support import certificates
from support.foreground import Up, processes_on
from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.nginx,
    pytest.mark.skipif(
        not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), reason="needs nginx (apt-get install nginx)"
    ),
]
NEEDS_ESPEAK = pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng (apt-get install espeak-ng)")

SECONDS = 0.1
"""That each piece takes."""

CHAPTERS, PARAGRAPHS = 3, 8
BOOK = "\n\n".join(
    f"# Chapter {chapter}\n\n"
    + "\n\n".join(f"Paragraph {number} of chapter {chapter}." for number in range(PARAGRAPHS))
    for chapter in range(CHAPTERS)
)
PIECES = CHAPTERS * (1 + PARAGRAPHS)


@dataclass(frozen=True)
class Fleet:
    file: Path
    journal: Path
    ports: list[int]

    def asked(self) -> list[str]:
        """Every text that an instance was asked to speak."""
        return [json.loads(line) for line in self.journal.read_text().splitlines()]


def toml(ports: list[int], server: str) -> str:
    *instances, front = ports
    gpus = "".join(f"{gpu} = {port}\n" for gpu, port in enumerate(instances))
    return f'[gpus]\n{gpus}[nginx]\nlisten = "127.0.0.1:{front}"\n[server]\n{server}\n[unit]\nrestart_delay_s = 1\n'


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two instances that take ``SECONDS`` for a piece."""
    folder = tmp_path_factory.mktemp("fixed")
    fleet = Fleet(folder / "fleet.toml", folder / "journal", free_ports(3))
    argv = [sys.executable, fixed_time_server.__file__, "--port", "{port}", "--seconds", SECONDS, "--journal"]
    command = json.dumps([str(argument) for argument in (*argv, fleet.journal)])
    fleet.file.write_text(toml(fleet.ports, f"command = {command}"))
    running = Up(fleet.file)
    running.wait_for("^ready")
    yield fleet
    running.end()


@pytest.fixture
def job(fixed: Fleet, tmp_path: Path) -> list[str]:
    """The command that speaks book.md into book.flac; nothing was asked yet."""
    fixed.journal.write_text("")
    (tmp_path / "book.md").write_text(BOOK)
    return command(fixed, tmp_path / "book.md", tmp_path / "book.flac")


def command(fleet: Fleet, book: Path, output: Path, *options: str) -> list[str]:
    typed = [sys.executable, "-m", "chatterbox_deploy", "speak", str(book), "-o", str(output)]
    return [*typed, "--fleet", str(fleet.file), *options]


def speak(argv: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*argv, *options], capture_output=True, text=True, check=False, timeout=120)


def heard(path: Path) -> bytes:
    with av.open(str(path)) as container:
        return b"".join(frame.to_ndarray().astype("<i2").tobytes() for frame in container.decode(audio=0))


def whole_book(text: str = BOOK) -> bytes:
    """The sound of every piece of ``text`` and the pauses between them."""
    sound = b""
    blocks = text.split("\n\n")
    for number, block in enumerate(blocks):
        after = blocks[number + 1][0] if number + 1 < len(blocks) else None
        pause_s = 0.0 if after is None else 1.2 if block[0] == "#" else 2.5 if after == "#" else 0.7
        silence = round(pause_s * fixed_time_server.SAMPLE_RATE_HZ)
        sound += fixed_time_server.pcm(block.removeprefix("# ")) + bytes(2 * silence)
    return sound


def test_every_piece_is_spoken_once_by_all_instances_at_once_and_heard_in_its_order(
    job: list[str], fixed: Fleet, tmp_path: Path
) -> None:
    done = speak(job, "--json")

    assert done.returncode == 0, done.stderr
    assert sorted(fixed.asked()) == sorted(block.removeprefix("# ") for block in BOOK.split("\n\n"))
    assert heard(tmp_path / "book.flac") == whole_book()
    told = json.loads(done.stdout)
    assert (told["pieces"], told["spoken"], told["kept"], told["retries"]) == (PIECES, PIECES, 0, 0)
    # least_conn: with two in flight for each, neither rests before the end.
    assert [share["pieces"] for share in told["instances"]] == [pytest.approx(PIECES / 2, abs=4)] * 2
    assert told["speaking_s"] >= SECONDS * PIECES / 2
    assert {path.name for path in tmp_path.iterdir()} == {"book.md", "book.flac"}
    assert done.stderr.startswith(f"{tmp_path}/book.flac: ")


def test_killed_in_the_middle_only_the_rest_is_asked_for(job: list[str], fixed: Fleet, tmp_path: Path) -> None:
    parts = tmp_path / "book.flac.parts"
    running = subprocess.Popen(job)
    while len(list(parts.glob("*.wav"))) < PIECES // 2:
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    running.wait()
    kept = len(list(parts.glob("*.wav")))
    # What an instance had in hand when its client died, it may still note.
    time.sleep(0.5)
    before = len(fixed.asked())

    done = speak(job, "--json")

    assert done.returncode == 0, done.stderr
    assert PIECES // 2 <= kept < PIECES
    assert json.loads(done.stdout)["kept"] == kept
    assert len(fixed.asked()) - before == PIECES - kept
    # Lost is at most what was in flight, two for each instance.
    assert len(fixed.asked()) <= PIECES + 4
    assert heard(tmp_path / "book.flac") == whole_book()
    assert not parts.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_says_what_is_kept_and_how_to_go_on(
    number: signal.Signals, job: list[str], tmp_path: Path
) -> None:
    parts = tmp_path / "book.flac.parts"
    running = subprocess.Popen(job, stderr=subprocess.PIPE, text=True)
    while len(list(parts.glob("*.wav"))) < 3:
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    _, said = running.communicate(timeout=20)

    assert running.returncode == 130
    kept = len(list(parts.glob("*.wav")))
    assert said == f"interrupted; {kept} pieces kept in {parts}; type the same again to go on\n"
    assert not (tmp_path / "book.flac").exists()


def test_of_a_changed_text_only_the_change_is_spoken(job: list[str], fixed: Fleet, tmp_path: Path) -> None:
    assert speak(job, "--keep-parts").returncode == 0
    changed = BOOK.replace("Paragraph 3 of chapter 1.", "This one is new.").replace("# Chapter 2\n\n", "")
    (tmp_path / "book.md").write_text(changed)
    fixed.journal.write_text("")

    done = speak(job, "--keep-parts", "--overwrite")

    assert done.returncode == 0, done.stderr
    assert fixed.asked() == ["This one is new."]
    assert heard(tmp_path / "book.flac") == whole_book(changed)


def test_of_two_at_once_the_second_refuses(job: list[str], tmp_path: Path) -> None:
    first = subprocess.Popen(job)
    lock = tmp_path / "book.flac.parts" / "lock"
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.01)
    # However long the second takes to begin.
    first.send_signal(signal.SIGSTOP)
    try:
        second = speak(job)
    finally:
        first.send_signal(signal.SIGCONT)

    assert second.returncode == 3
    assert f"(process {first.pid}) is using {tmp_path}/book.flac.parts; wait until it has ended" in second.stderr
    assert first.wait(timeout=60) == 0
    assert heard(tmp_path / "book.flac") == whole_book()


def test_an_instance_that_dies_costs_nothing(job: list[str], fixed: Fleet, tmp_path: Path) -> None:
    parts = tmp_path / "book.flac.parts"
    running = subprocess.Popen(job)
    while len(list(parts.glob("*.wav"))) < 4:
        assert running.poll() is None
        time.sleep(0.01)
    for pid in processes_on(fixed.ports[0]):
        os.kill(pid, signal.SIGKILL)

    assert running.wait(timeout=60) == 0
    assert heard(tmp_path / "book.flac") == whole_book()


def test_through_a_front_with_tls_a_name_and_keys(tmp_path: Path) -> None:
    certificate, key = tmp_path / "fullchain.pem", tmp_path / "privkey.pem"
    certificates.self_signed(certificate, key, "tts.example")
    (tmp_path / "keys").write_text('"~^Bearer secret$" alice;\n')
    (tmp_path / "key").write_text("secret\n")
    (tmp_path / "book.txt").write_text("Hello.")
    ports = free_ports(2)
    front = f'tls_certificate = "{certificate}"\ntls_key = "{key}"\nserver_name = "tts.example"\n'
    front += f'api_keys_file = "{tmp_path}/keys"\n'
    argv = [sys.executable, fixed_time_server.__file__, "--port", "{port}", "--seconds", "0.01"]
    written = toml(ports, f"command = {json.dumps(argv)}").replace("[nginx]\n", f"[nginx]\n{front}")
    fleet = Fleet(tmp_path / "fleet.toml", tmp_path / "journal", ports)
    fleet.file.write_text(written)
    running = Up(fleet.file)
    try:
        running.wait_for("^ready")
        job = command(fleet, tmp_path / "book.txt", tmp_path / "book.flac")
        shut_out = speak(job)
        let_in = speak(job, "--api-key-file", str(tmp_path / "key"))
    finally:
        running.end()

    assert shut_out.returncode == 3
    assert "give an API key: --api-key-file FILE, or $CHATTERBOX_API_KEY" in shut_out.stderr
    assert let_in.returncode == 0, let_in.stderr
    assert heard(tmp_path / "book.flac") == fixed_time_server.pcm("Hello.")


@NEEDS_ESPEAK
def test_a_book_through_espeak_has_chapters_and_subtitles_where_they_sound(tmp_path: Path) -> None:
    ports = free_ports(3)
    (tmp_path / "fleet.toml").write_text(toml(ports, 'engine = "espeak"'))
    text = "---\ntitle: A Book\nauthor: Ada\n---\n" + BOOK.replace("Paragraph 3", "Long: " + "word after word, " * 40)
    (tmp_path / "book.md").write_text(text)
    running = Up(tmp_path / "fleet.toml")
    try:
        running.wait_for("^ready")
        fleet = Fleet(tmp_path / "fleet.toml", tmp_path, ports)
        done = speak(
            command(fleet, tmp_path / "book.md", tmp_path / "book.m4b"),
            "--subtitles",
            str(tmp_path / "b.srt"),
            "--json",
        )
    finally:
        running.end()

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [share["instance"] for share in told["instances"]] == ["gpu0", "gpu1"]
    cues = [cue.split("\n", 2) for cue in (tmp_path / "b.srt").read_text().strip().split("\n\n")]
    assert len(cues) == told["pieces"] > PIECES
    with av.open(str(tmp_path / "book.m4b")) as container:
        chapters = [(float(c["start"] * (c["time_base"] or 0)), c["metadata"]["title"]) for c in container.chapters()]
        tags = dict(container.metadata)
        length_s = sum(frame.samples for frame in container.decode(audio=0)) / container.streams.audio[0].rate
    assert [title for _, title in chapters] == [f"Chapter {chapter}" for chapter in range(CHAPTERS)]
    assert (tags["title"], tags["artist"]) == ("A Book", "Ada")
    assert length_s == pytest.approx(told["duration_s"], abs=0.05)
    # A chapter begins with the cue that says its title.
    starts = {said: seconds(times.split(" --> ")[0]) for _, times, said in cues}
    for start_s, title in chapters:
        assert start_s == pytest.approx(starts[title], abs=0.002)


def seconds(time_of_cue: str) -> float:
    hours, minutes, rest = time_of_cue.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest.replace(",", "."))
