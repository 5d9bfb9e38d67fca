"""Files in a directory are voices; nothing else is. What is added is there at once, whole, or not at all."""

import io
import stat
import threading
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_server.recordings import NotARecording
from chatterbox_server.voices import (
    DEFAULT,
    MOST,
    OPENAI,
    BadName,
    Library,
    LibraryFull,
    LibraryReadOnly,
    NameTaken,
    UnknownVoice,
)


def a_recording(seconds: float = 6.0, hertz: float = 150.0) -> io.BytesIO:
    time_s = np.arange(round(seconds * 16_000)) / 16_000
    file = io.BytesIO()
    soundfile.write(file, 0.2 * np.sin(2 * np.pi * hertz * time_s), 16_000, format="FLAC")
    file.seek(0)
    return file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    voices = tmp_path / "voices"
    voices.mkdir()
    (tmp_path / "secret.wav").touch()
    return voices


def test_without_a_directory_there_is_the_built_in_voice(tmp_path: Path) -> None:
    for library in (Library(None), Library(tmp_path / "not yet made")):
        assert set(library.voices()) == {DEFAULT} | OPENAI
        assert {library.find(name).recording for name in (DEFAULT, "alloy", "verse")} == {None}


def test_a_recording_is_a_voice_as_soon_as_it_lies_there(directory: Path) -> None:
    library = Library(directory)
    (directory / "anna.wav").touch()
    assert library.find("anna").recording == directory / "anna.wav"


def test_openais_name_means_the_recording_of_that_name_if_there_is_one(directory: Path) -> None:
    (directory / "nova.mp3").touch()
    assert Library(directory).find("nova").recording == directory / "nova.mp3"
    assert Library(directory).find("echo").recording is None


def test_the_best_format_of_a_name_wins(directory: Path) -> None:
    for extension in ("mp3", "ogg", "flac"):
        (directory / f"anna.{extension}").touch()
    assert Library(directory).find("anna").recording == directory / "anna.flac"


def test_what_is_no_recording_is_no_voice(directory: Path) -> None:
    for name in ("notes.txt", "a b.wav", ".wav", f"{'x' * 65}.wav", "ünï.wav", "default.wav", "loud.WAV"):
        (directory / name).touch()
    (directory / "folder.wav").mkdir()
    assert set(Library(directory).voices()) == {DEFAULT} | OPENAI


def test_what_is_found_by_its_name_is_what_the_list_of_all_says(directory: Path) -> None:
    for name in ("anna.wav", "anna.flac", "nova.mp3", "echo.txt"):
        (directory / name).touch()
    library = Library(directory, {"alloy": "anna", "anna": "nova", "bea": "bob"})
    for name, voice in library.voices().items():
        if voice.there:
            assert library.find(name) == voice
    with pytest.raises(UnknownVoice, match="voice 'bea', which stands for 'bob' here, is not there"):
        library.find("bea")


def test_an_unknown_voice_is_told_the_known_ones(directory: Path) -> None:
    (directory / "anna.wav").touch()
    with pytest.raises(UnknownVoice) as told:
        Library(directory).find("ana")
    assert str(told.value) == "unknown voice 'ana' (did you mean 'anna'?); known: default, anna"


@given(name=st.text() | st.sampled_from(["../secret", "/etc/passwd", "anna/../../secret", "..", ".", ""]))
def test_no_name_reaches_outside_the_directory(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "reach"
    (root / "voices").mkdir(parents=True, exist_ok=True)
    (root / "secret.wav").touch()
    try:
        found = Library(root / "voices").find(name)
    except UnknownVoice:
        return
    assert found.recording is None


def test_a_link_that_leads_out_of_the_directory_is_no_voice(directory: Path) -> None:
    (directory / "anna.wav").touch()
    (directory / "out.wav").symlink_to(directory.parent / "secret.wav")
    (directory / "gone.wav").symlink_to(directory / "nothing.wav")
    (directory / "nova.wav").symlink_to("anna.wav")
    assert set(Library(directory).voices()) == {DEFAULT, "anna"} | OPENAI
    assert Library(directory).find("nova").kind == "recording"


def test_a_directory_that_is_a_link_itself_is_fine(directory: Path, tmp_path: Path) -> None:
    (directory / "anna.wav").touch()
    (tmp_path / "linked").symlink_to(directory)
    assert Library(tmp_path / "linked").find("anna").kind == "recording"


def test_an_alias_speaks_with_the_voice_it_stands_for(directory: Path) -> None:
    (directory / "anna.wav").touch()
    library = Library(directory, {"alloy": "anna", "narrator": "default", "echo": "bob", "loop": "narrator"})
    assert library.find("alloy").recording == directory / "anna.wav"
    assert library.find("narrator").recording is None
    assert library.find("nova").recording is None
    assert [name for name, voice in library.voices().items() if not voice.there] == ["echo", "loop"]
    with pytest.raises(UnknownVoice) as told:
        library.find("echo")
    assert str(told.value) == "voice 'echo', which stands for 'bob' here, is not there; known: default, anna"


# -- adding, renaming, removing ---------------------------------------------------------------------------


def test_what_is_added_is_a_voice_of_every_instance_at_once(directory: Path) -> None:
    one, other = Library(directory), Library(directory)
    added = one.add("anna", a_recording())

    assert other.find("anna") == added
    assert names(directory) == ["anna.wav"]
    assert stat.S_IMODE((directory / "anna.wav").stat().st_mode) == 0o640
    with wave.open(str(directory / "anna.wav")) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, 24_000)
        assert added.duration_s == pytest.approx(sound.getnframes() / 24_000, abs=0.001) == pytest.approx(6, abs=0.1)


def test_a_voice_is_replaced_only_on_purpose(directory: Path) -> None:
    library = Library(directory)
    library.add("anna", a_recording())
    before = (directory / "anna.wav").read_bytes()
    with pytest.raises(NameTaken, match="there is a voice 'anna' already"):
        library.add("anna", a_recording(hertz=300))
    assert (directory / "anna.wav").read_bytes() == before

    library.add("anna", a_recording(hertz=300), replace=True)
    assert (directory / "anna.wav").read_bytes() != before
    assert names(directory) == ["anna.wav"]


def test_of_two_who_add_the_same_name_at_once_one_is_told(directory: Path) -> None:
    outcomes: list[str] = []

    def add(hertz: float) -> None:
        try:
            Library(directory).add("anna", a_recording(hertz=hertz))
            outcomes.append("added")
        except NameTaken:
            outcomes.append("taken")

    adding = [threading.Thread(target=add, args=(150.0 + 10 * n,)) for n in range(4)]
    for thread in adding:
        thread.start()
    for thread in adding:
        thread.join()
    assert sorted(outcomes) == ["added", "taken", "taken", "taken"]
    assert names(directory) == ["anna.wav"]


def test_what_is_no_recording_leaves_nothing_behind(directory: Path) -> None:
    with pytest.raises(NotARecording):
        Library(directory).add("anna", io.BytesIO(b"no sound"))
    assert names(directory) == []


@pytest.mark.parametrize(
    "name", ["", "a b", "../anna", "/etc/passwd", "x" * 65, "größe", "a.wav", ".part", "anna\n", "default"]
)
def test_a_name_that_cannot_be_a_voice_is_refused(name: str, directory: Path) -> None:
    library = Library(directory)
    with pytest.raises(BadName):
        library.add(name, a_recording())
    library.add("anna", a_recording())
    with pytest.raises(BadName):
        library.rename("anna", name)
    assert names(directory) == ["anna.wav"]


def test_the_name_of_an_alias_cannot_be_taken_from_it(directory: Path) -> None:
    library = Library(directory, {"alloy": "anna"})
    with pytest.raises(NameTaken, match="'alloy' stands for 'anna' here: choose another name"):
        library.add("alloy", a_recording())
    assert library.add("nova", a_recording()).kind == "recording"


def test_a_voice_can_be_renamed_and_removed_with_all_its_files(directory: Path) -> None:
    library = Library(directory)
    library.add("anna", a_recording())
    (directory / "anna.mp3").touch()

    assert library.rename("anna", "bob").recording == directory / "bob.wav"
    assert names(directory) == ["bob.mp3", "bob.wav"]
    library.remove("bob")
    assert names(directory) == []
    with pytest.raises(UnknownVoice):
        library.remove("bob")


def test_a_rename_never_overwrites(directory: Path) -> None:
    (directory / "anna.wav").write_bytes(b"anna")
    (directory / "bob.mp3").write_bytes(b"bob")
    for new in ("bob", "anna"):
        with pytest.raises(NameTaken, match=f"there is a voice '{new}' already"):
            Library(directory).rename("anna", new)
    assert (directory / "anna.wav").read_bytes() == b"anna"
    assert names(directory) == ["anna.wav", "bob.mp3"]


@pytest.mark.parametrize("name", ["default", "alloy"])
def test_only_recordings_are_renamed_or_removed(name: str, directory: Path) -> None:
    for change in (lambda: Library(directory).remove(name), lambda: Library(directory).rename(name, "new")):
        with pytest.raises(BadName, match=f"'{name}' is no recording"):
            change()


def test_what_is_half_written_is_no_voice(directory: Path) -> None:
    (directory / ".abc.part").touch()
    assert set(Library(directory).voices()) == {DEFAULT} | OPENAI


def test_a_library_has_an_end_though_what_is_in_it_can_be_replaced(directory: Path) -> None:
    for number in range(MOST):
        (directory / f"voice{number}.wav").touch()
    with pytest.raises(LibraryFull, match="1000 recordings are kept, and no more may: remove one"):
        Library(directory).add("anna", a_recording())
    assert Library(directory).add("voice7", a_recording(), replace=True).name == "voice7"


def test_a_directory_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory, why in (
        (None, "cannot keep voices: this server has no directory for them"),
        (
            tmp_path / "missing",
            f"cannot write to the directory of voices, {tmp_path}/missing: No such file or directory; "
            f"on the server: mkdir -p {tmp_path}/missing",
        ),
        (tmp_path / "file", f"cannot write to the directory of voices, {tmp_path}/file: Not a directory"),
        # Even root may not create files here.
        (Path("/proc/self"), "cannot write to the directory of voices, /proc/self: No such file or directory"),
    ):
        with pytest.raises(LibraryReadOnly) as told:
            Library(directory).add("anna", a_recording())
        assert str(told.value) == why
