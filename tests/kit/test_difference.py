"""Comparing a host with a fleet."""

from __future__ import annotations

from pathlib import PurePosixPath

from chatterbox_deploy import render
from chatterbox_deploy.change import difference
from chatterbox_deploy.render import RenderedFile

HEADER = render.header("/etc/fleet.toml") + "\n"
A, B, C = (PurePosixPath(f"/etc/systemd/system/chatterbox-tts-gpu{n}.service") for n in range(3))


def test_new_changed_unchanged_and_stale_files_are_told_apart() -> None:
    wanted = [RenderedFile(A, HEADER + "new"), RenderedFile(B, HEADER + "same")]

    changes = difference.compare(wanted, {B: HEADER + "same", C: HEADER + "old"})

    assert [change.file.path for change in changes.to_write] == [A]
    assert changes.unchanged == (B,)
    assert changes.stale == (C,)
    assert changes


def test_a_file_without_our_header_is_foreign_and_never_stale() -> None:
    changes = difference.compare([RenderedFile(A, HEADER)], {A: "[Unit]\n", B: "[Unit]\n"})

    assert changes.foreign == (A,)
    assert changes.to_write == ()
    assert changes.stale == ()


def test_nothing_to_do_is_false() -> None:
    assert not difference.compare([RenderedFile(A, HEADER)], {A: HEADER})


def test_the_diff_reads_like_this() -> None:
    (change,) = difference.compare([RenderedFile(A, HEADER + "b\n")], {A: HEADER + "a\n"}).to_write

    assert change.diff().splitlines()[-2:] == ["-a", "+b"]
    assert change.diff().startswith(f"--- a{A}\n+++ b{A}\n")
