"""Processes of their own for commands: one, or several side by side of which one at a time is timed.

Most of what a benchmark does is not timed: it imports, loads and compiles. `side_by_side` lets several do that at once.
Before its first timed image each calls `wait_for_turn`, which says `READY` and stops the process; one at a time is let
go on, until it ends, while all others are stopped wherever they are. For POSIX systems.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
READY = "ready to be timed"
# What a stopped process has launched still runs: with CUDA graphs up to a whole image. Of longer ones the rest shares
# the GPU with the untimed image that comes next.
DRAIN_S = 3.0
POLL_S = 0.1


def wait_for_turn() -> None:
    """Stops this process until it is let go on. It says so first, since `side_by_side` stops processes too."""
    print(READY, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)


class Child:
    """A command in a process group of its own, which can be held and let go on with all that it started."""

    def __init__(self, command: list[str]):
        self._output = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as this
        self._ran, self._since = 0.0, time.monotonic()
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self._output,
                                         stderr=subprocess.STDOUT, start_new_session=True)

    def is_over(self) -> bool:
        return self._process.poll() is not None

    @property
    def held(self) -> bool:
        return self._since is None

    def seconds(self) -> float:
        """Since its start, less those in which it was held."""
        return self._ran + (0.0 if self.held else time.monotonic() - self._since)

    def output(self) -> str:
        # Without a seek, which would move the place at which the child writes.
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def hold(self) -> None:
        self._signal(signal.SIGSTOP)
        self._ran, self._since = self.seconds(), None

    def go_on(self) -> None:
        self._since = time.monotonic() if self.held else self._since
        self._signal(signal.SIGCONT)

    def end(self, within: float = 0.0) -> int | None:
        """Its exit code; None if it was still there then and was killed, with all that it started."""
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        if not self.is_over():
            os.killpg(self._process.pid, number)


def execute(command: list[str], timeout: float) -> tuple[int | None, str]:
    """Runs one command; its exit code, None if it ran past `timeout`, and its output."""
    child = Child(command)
    return child.end(timeout), child.output()


Ended = tuple[int, int | None, str, float]


def side_by_side(commands: list[list[str]], at_once: int, timeout: float) -> Iterator[Ended]:
    """Runs commands that call `wait_for_turn`, up to `at_once` of them at a time; yields the place of each in
    `commands`, its exit code, None if it ran past `timeout`, its output and its seconds, as they end. Timeout and
    seconds are without the time in which it was held. Those that wait take turns in the order in which they were found
    to wait. Closed early, it leaves no process behind."""
    left, running, ready, timed = dict(enumerate(commands)), {}, [], None
    try:
        while left or running:
            for child in [child for child in running if child.is_over() or child.seconds() > timeout]:
                code, place = child.end(), running.pop(child)
                ready, timed = [one for one in ready if one is not child], None if child is timed else timed
                yield place, code, child.output(), child.seconds()
            if timed is None:
                ready += [child for child in running if child not in ready and READY in child.output()]
                if ready:
                    timed = ready.pop(0)
                    _stop(running, {timed, *ready})
                else:
                    _resume(running)
                    for place in list(left)[:at_once - len(running)]:
                        running[Child(left.pop(place))] = place
            if timed:
                # Again and again: held between its READY and its own stop, it would stop once more.
                timed.go_on()
            time.sleep(POLL_S)
    finally:
        for child in running:
            child.end()


def _stop(running, waiting) -> None:
    """Holds all; returns when the GPU has done what those that do not wait yet have launched."""
    at_work = any(not child.held for child in running if child not in waiting)
    for child in running:
        child.hold()
    if at_work:
        time.sleep(DRAIN_S)


def _resume(running) -> None:
    """Lets those go on that are held, and no others: one that says READY just now must not be sent past its stop."""
    for child in running:
        if child.held:
            child.go_on()
