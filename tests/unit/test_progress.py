"""Progress: silent when quiet, a line now and then without a terminal, a bar on one."""

import io
import subprocess
import sys

import pytest

from halflap.progress import Progress, duration, is_quiet, set_quiet, short, track


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def quiet():
    set_quiet(True)
    yield
    set_quiet(False)


def run(stream, seconds_each, steps=10, **options):
    clock = Clock()
    with Progress("train", steps, unit="steps", stream=stream, clock=clock, **options) as progress:
        for _ in range(steps):
            clock.now += seconds_each
            progress.note(loss="2.5")
            progress.advance()


def test_short_work_says_nothing_without_a_terminal():
    stream = io.StringIO()
    run(stream, 0.5)
    assert stream.getvalue() == ""


def test_long_work_says_a_line_at_most_every_ten_seconds():
    stream = io.StringIO()
    run(stream, 6)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: 2/10 steps, loss 2.5, 48s left"
    assert lines[-1] == "train: 10/10 steps done in 1m00s"
    assert len(lines) == 6


def test_quiet_says_nothing(quiet):
    assert is_quiet()
    for stream in (io.StringIO(), Terminal()):
        run(stream, 60)
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_time_left():
    stream = Terminal()
    run(stream, 6)
    assert "10/10 steps, loss 2.5, 0s left" in stream.getvalue()


def test_bars_nest_on_a_terminal():
    stream = Terminal()
    with Progress("outer", 2, stream=stream) as outer:
        for _ in range(2):
            with Progress("inner", 1, stream=stream) as inner:
                inner.advance()
            outer.advance()
    assert "2/2" in stream.getvalue()


def test_a_resumed_run_estimates_from_its_own_speed():
    clock = Clock()
    progress = Progress("train", 100, clock=clock)
    with progress:
        progress.start_at(90)
        assert progress.seconds_left() is None
        clock.now = 10
        progress.advance(5)
        assert progress.seconds_left() == pytest.approx(10)


def test_track_yields_everything():
    assert list(track(range(5), "count")) == [0, 1, 2, 3, 4]
    assert list(track(iter("ab"), "count", total=2)) == ["a", "b"]


def test_items_of_an_earlier_run_do_not_enter_the_time_left(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(Progress.__init__, "__kwdefaults__", {**Progress.__init__.__kwdefaults__, "clock": clock})
    for item in track(range(10), "study", passed=6):
        clock.now += 0 if item < 6 else 100
    assert [line for line in capsys.readouterr().err.splitlines() if "left" in line] == [
        "study: 7/10, 5m00s left",
        "study: 8/10, 3m20s left",
        "study: 9/10, 1m40s left",
        "study: 10/10, 0s left",
    ]


def test_wording_of_amounts_and_times():
    assert [short(x) for x in (7, 9999, 12300, 4.3e9, 1e12)] == ["7", "9999", "12.3K", "4.3B", "1T"]
    assert [duration(x) for x in (0.4, 59.7, 185, 7620)] == ["0s", "1m00s", "3m05s", "2h07m"]


def test_where_the_reader_has_gone_work_goes_on() -> None:
    """As after `2>&1 | head -1`, and with `tee`, which the same Ctrl-C ends."""
    code = (
        "import os, sys, time\n"
        "from halflap.progress import tell\n"
        "tell('one')\n"
        "sys.stdin.readline()\n"
        "for _ in range(3): tell('more')\n"
        "os.write(1, b'done')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None and process.stderr.readline() == b"one\n"
    process.stderr.close()
    out, _ = process.communicate(b"\n", timeout=60)
    assert out == b"done" and process.returncode == 0
