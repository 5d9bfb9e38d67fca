"""Files are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import LocalHost, save
from chatterbox_deploy.render import RenderedFile

if TYPE_CHECKING:
    from collections.abc import Iterator

A, B = PurePosixPath("/etc/a"), PurePosixPath("/etc/b")


def everything_below(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_files_land_below_the_root_with_their_mode(tmp_path: Path) -> None:
    LocalHost(tmp_path).write_files([RenderedFile(A, "text", mode=0o640)])

    assert everything_below(tmp_path) == {"etc/a": "text"}
    assert (tmp_path / "etc/a").stat().st_mode & 0o777 == 0o640


def test_if_one_file_cannot_be_written_none_is_changed_and_nothing_is_left_behind(tmp_path: Path) -> None:
    LocalHost(tmp_path).write_files([RenderedFile(A, "old")])
    (tmp_path / "etc/b").mkdir()

    with pytest.raises(CommandFailed, match=r"cannot write .*/etc/b: is a directory"):
        LocalHost(tmp_path).write_files([RenderedFile(A, "new"), RenderedFile(B, "new")])

    assert everything_below(tmp_path) == {"etc/a": "old"}


def test_what_is_saved_is_whole_or_as_before_and_keeps_its_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")

    save(tmp_path / "link", "after")

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"
    with pytest.raises(CommandFailed, match=r"cannot write .*/gone/a: no such file or directory"):
        save(tmp_path / "gone" / "a", b"")
    with pytest.raises(CommandFailed, match=r"cannot write .*: is a directory"):
        save(tmp_path, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    save(fifo, "sound")

    assert os.read(reader, 100) == b"sound"
    assert fifo.is_fifo()
    os.close(reader)


def test_a_missing_file_is_none_and_an_unreadable_one_is_an_error(tmp_path: Path) -> None:
    host = LocalHost(tmp_path)
    (tmp_path / "etc/a").mkdir(parents=True)

    assert host.read_bytes(B) is None
    with pytest.raises(CommandFailed, match=r"cannot read .*/etc/a: not a regular file"):
        host.read_bytes(A)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/a")

    with pytest.raises(CommandFailed, match="not a regular file"):
        LocalHost(tmp_path).read_bytes(A)


@contextmanager
def as_nobody() -> Iterator[Path]:
    """An ordinary user, and a directory that such a user can enter; for an ordinary user, nothing changes."""
    was = os.geteuid()
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        (Path(directory) / "etc").mkdir(mode=0o555)
        if was == 0:
            os.seteuid(65534)
        try:
            yield Path(directory)
        finally:
            os.seteuid(was)


def test_without_permission_the_message_says_sudo() -> None:
    with as_nobody() as directory, pytest.raises(CommandFailed, match="permission denied; run it as root"):
        LocalHost(directory).write_files([RenderedFile(A, "text")])


def test_a_growing_file_is_read_on_from_where_it_ended(tmp_path: Path) -> None:
    host = LocalHost(tmp_path)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/a").write_text("one\n")

    first = host.read_on(A, {}, limit_bytes=100)
    with (tmp_path / "etc/a").open("a") as stream:
        stream.write("two\n")
    assert first is not None
    second = host.read_on(A, {first.inode: first.start + len(first.content)}, limit_bytes=100)
    assert second is not None
    assert (first.start, first.content, second.start, second.content) == (0, b"one\n", 4, b"two\n")

    (tmp_path / "etc/a").write_text("1\n")
    cut = host.read_on(A, {first.inode: 8}, limit_bytes=100)
    assert cut is not None
    assert (cut.start, cut.content) == (0, b"1\n")


def test_of_a_long_file_only_the_end_is_read_and_of_none_nothing(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/a").write_text("0123456789")

    piece = LocalHost(tmp_path).read_on(A, {}, limit_bytes=4)

    assert piece is not None
    assert (piece.start, piece.content) == (6, b"6789")
    assert LocalHost(tmp_path).read_on(B, {}, limit_bytes=4) is None
