"""Files in a directory are voices; nothing else is."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_server.voices import DEFAULT, OPENAI, Library, UnknownVoice


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


def test_a_directory_that_may_not_be_read_leaves_the_built_in_voice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", forbidden)

    assert Library(tmp_path).find("default").recording is None
