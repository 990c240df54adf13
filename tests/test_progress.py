"""Progress lines where there is no terminal, and a bar where there is one."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from llm2clip.progress import Progress, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3675, "1:01:15"), (36000, "10:00:00")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_lines_say_how_far_how_fast_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "job", "things", initial=4, every=0.0) as bar:
        time.sleep(0.05)
        bar.update(2, note="loss 1.5")
        assert bar.done == 6
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    found = re.fullmatch(
        r"job: 6/10 things \(60 %\), (\d+\.\d)/s, \d:\d\d gone, \d:\d\d left, loss 1\.5", lines[0]
    )
    assert found and 0 < float(found[1]) <= 40  # 2 things since the start, not 6


def test_lines_do_not_come_too_often(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None, "job", every=60.0) as bar:
        assert list(bar.track([3, 4])) == [3, 4]
    assert re.fullmatch(r"job: 2 steps, \d+\.\d/s, \d:\d\d gone\n", capsys.readouterr().err)


def test_silence_when_disabled_failed_or_closed(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, "job", every=0.0, enabled=False) as bar:
        bar.update()
    with pytest.raises(ZeroDivisionError), Progress(1, "job"):
        _ = 1 / 0
    assert capsys.readouterr().err == ""
    bar = Progress(0, "job")
    bar.close()
    bar.close()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("columns", [0, 90])
def test_a_terminal_gets_a_bar(columns: int) -> None:
    code = (
        "from llm2clip.progress import Progress\n"
        "with Progress(4, 'job', 'things', initial=1) as bar:\n"
        "    for _ in range(3): bar.update(note='loss 2')\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert b"job: 100%" in shown and b"4/4" in shown and b"loss 2" in shown
