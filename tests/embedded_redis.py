"""The Valkey server that `zimage serve` embeds, for tests of what is kept in it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from servers import environment, wait_until

from zimage import redis_server


def start_guard(folder: Path, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """The process that runs the embedded server of this folder. Its standard input is the lifeline."""
    return subprocess.Popen(
        [sys.executable, "-m", "zimage.redis_server", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env=environment(ZIMAGE_LIFELINE="1"),
    )


def start_redis(folder: Path) -> subprocess.Popen[bytes]:
    """The embedded server of this folder, answering."""
    process = start_guard(folder)
    wait_until(lambda: redis_server.answers(redis_server.socket_path(folder)), "the embedded Redis answers")
    return process


def end(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> int:
    """Sends the signal and answers the exit status."""
    process.send_signal(number)
    status = process.wait(30)
    assert process.stdin is not None
    process.stdin.close()
    return status


class EmbeddedRedis:
    """A running server of a folder, which may be away for a while."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._guard = folder, start_redis(folder)
        self.url = f"unix://{redis_server.socket_path(folder)}"

    def stop(self) -> None:
        """Ends it in order; its folder keeps what it held."""
        assert end(self._guard) == 0

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """It is there, and answers nothing."""
        (server,) = psutil.Process(self._guard.pid).children()
        server.suspend()
        try:
            yield
        finally:
            server.resume()

    @contextmanager
    def gone(self) -> Iterator[None]:
        """It has ended; then another one of the same folder begins."""
        self.stop()
        try:
            yield
        finally:
            self._guard = start_redis(self._folder)


@contextmanager
def embedded_redis(folder: Path) -> Iterator[EmbeddedRedis]:
    """A server of this folder."""
    redis = EmbeddedRedis(folder)
    try:
        yield redis
    finally:
        redis.stop()
