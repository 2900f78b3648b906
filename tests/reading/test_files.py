"""Only regular files are opened, without blocking and up to a size limit."""

import os
import socket
import subprocess
import sys

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import check_regular, open_regular, read_bytes, read_text


def test_content(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf\xc3\xa4\n")
    assert read_bytes(tmp_path / "a", most=6) == b"\xef\xbb\xbf\xc3\xa4\n"
    assert read_text(tmp_path / "a", most=6) == "ä\n" and check_regular(tmp_path / "a") == 6
    with pytest.raises(UserError, match="a: larger than 5 bytes"):
        read_bytes(tmp_path / "a", most=5)


def test_a_link_to_a_file_is_one(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a")
    assert read_bytes(tmp_path / "b", most=1) == b"x"


HOLDER = """
import fcntl, os, signal, sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
fcntl.fcntl(os.open(sys.argv[1], os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.exit(signal.sigtimedwait({signal.SIGIO}, 60) is None)
"""
"""Gives its lease back when the kernel asks for it."""


def test_a_lease_on_a_file_is_waited_for(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "a"], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            assert read_bytes(tmp_path / "a", most=1) == b"x"
            assert holder.wait(timeout=10) == 0
        finally:
            holder.kill()


@pytest.mark.parametrize(
    "name, message",
    [
        ("folder", "folder: is a folder; name a file"),
        ("pipe", "pipe: is a named pipe; name a file"),
        ("socket", "socket: cannot be opened: "),
        ("/dev/zero", "/dev/zero: is a device; name a file"),
        ("none", "none: no such file"),
        ("dangling", "dangling: links to nowhere, which does not exist"),
        ("circle", "circle: cannot be opened: "),
        ("folder/none/x", "x: no such file"),
        ("a\0b", "cannot be opened: embedded null byte"),
        ("x" * 300, "cannot be opened: File name too long"),
        ("two\nlines", r"two\\nlines: no such file"),
    ],
)
def test_what_is_not_a_file_is_named_at_once(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's address has at most 107 bytes
        server.bind("socket")
        os.chdir(here)
        for opening in (open_regular, check_regular):
            with pytest.raises(UserError, match=message) as error:
                opening(tmp_path / name)
            assert "\n" not in str(error.value)


def test_the_line_of_a_bad_byte(tmp_path):
    (tmp_path / "a").write_bytes(b"one\ntwo\xff\n")
    with pytest.raises(UserError, match="a, line 2: byte 0xff is not UTF-8"):
        read_text(tmp_path / "a", most=100)
