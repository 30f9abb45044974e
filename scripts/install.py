"""Make `.venv` and put everything that zimage needs into it: `python3 scripts/install.py [--group test]`.

Standard library only, as it runs before anything is installed. It uses uv where uv is on PATH, else pip. torch comes
first, in the build that fits the machine; then the rest of requirements.lock (and with `--group test` also
requirements-test.lock); then the project itself, editable. A stamp in the environment makes a second run do nothing.
The build of torch: the CPU's, unless an NVIDIA driver is found on Linux; ZIMAGE_TORCH=cpu or cuda decides it by hand,
and it then stays what it is for this environment. The CPU's comes from a wheel in pip's or uv's find-links
directories, else from where uv's `--torch-backend=cpu` finds it, so that no CUDA package is ever downloaded for it.
ZIMAGE_EXTRAS names what only some options need, as the images' variable of that name does: quantization, cache or
both. What was installed once stays.
What this doesn't know: any registry's address (pip and uv have their own settings), AMD and Intel GPUs, whether a
CUDA build fits the driver when uv is absent, and the weights of the models.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
TEST_LOCK = ROOT / "requirements-test.lock"
SUPPORTED = ((3, 11), (3, 12), (3, 13))
BUILDS = {"cpu": "the CPU", "cuda": "NVIDIA GPUs"}
EXTRAS = ("cache", "quantization")


class InstallError(Exception):
    """The installation can't go on; the text says why and what to do next."""


@dataclass(frozen=True)
class Venv:
    """A virtual environment and the tool that fills it: a path to uv, or None for pip."""

    path: Path
    uv: str | None

    @property
    def scripts(self) -> Path:
        """Where its commands lie."""
        return self.path / ("Scripts" if os.name == "nt" else "bin")

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.scripts / ("python.exe" if os.name == "nt" else "python")

    @property
    def stamp(self) -> Path:
        """The file that says what was installed."""
        return self.path / "zimage-installed.json"

    def read_stamp(self) -> dict[str, str]:
        """What earlier runs installed; nothing where there were none or the environment is broken."""
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) and self.python.exists() else {}

    def write_stamp(self, stamp: dict[str, str]) -> None:
        """Note what is installed, for later runs."""
        self.stamp.write_text(json.dumps(stamp) + "\n", encoding="utf-8")

    def install(self, what: list[str], *, uv: str | None = None, show: bool = False) -> bool:
        """Install with uv or pip; their errors reach the terminal, their progress only where `show` asks for it."""
        tool = uv or self.uv
        quiet = not (show and sys.stderr.isatty())
        if tool:
            return run(
                [tool, "pip", "install", "--compile-bytecode", *["-q"] * quiet, "--python", str(self.python), *what]
            )
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install"]
        return run([*pip, *["-qq"] * quiet, *what])


def say(text: str) -> None:
    """Tell the user, at once even when make or CI holds the other end."""
    print(f"install: {text}", flush=True)


def run(command: list[str]) -> bool:
    """Whether the command succeeded; what it says goes where our own words go."""
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def ask(command: list[str]) -> str:
    """What the command prints, or nothing where it can't be run or fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def python_version(python: str) -> tuple[int, ...]:
    """An interpreter's version, such as (3, 12); empty where it doesn't run."""
    return tuple(map(int, ask([python, "-c", "import sys; print(*sys.version_info[:2])"]).split()))


def use_supported_python() -> None:
    """Go on in this interpreter, or start again in a supported one from PATH."""
    if sys.version_info[:2] in SUPPORTED:
        return
    for name in ("python3.13", "python3.12", "python3.11"):
        if python_version(name) in SUPPORTED:
            say(f"this is Python {platform.python_version()}; going on with {name}")
            os.execvp(name, [name, *sys.argv])  # noqa: S606  # there is no shell in this
    raise InstallError(
        f"zimage needs Python 3.11, 3.12 or 3.13, this is {platform.python_version()} and PATH has no other. "
        "Install one of them, then run this again."
    )


def torch_version() -> str:
    """The version of torch that the lock names."""
    found = re.search(r"^torch==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise InstallError(f"{LOCK.name} names no torch. Restore the file from git, or make it anew with `make lock`.")
    return found[1]


def fingerprints(group: str | None) -> dict[str, str]:
    """What an environment must hold, in a form to compare; the place counts, as environments can't be moved."""

    def digest(*files: Path) -> str:
        return hashlib.sha256(b"\0".join([str(ROOT).encode(), *(file.read_bytes() for file in files)])).hexdigest()

    try:
        found = {"base": digest(LOCK, ROOT / "pyproject.toml")}
        return {**found, group: digest(TEST_LOCK)} if group else found
    except FileNotFoundError as missing:
        raise InstallError(f"{missing.filename} is missing. Restore it from git, then run this again.") from missing


def wanted_extras(before: str) -> str:
    """The extras that ZIMAGE_EXTRAS asks for and those that this environment has, with spaces between them."""
    names = set(os.environ.get("ZIMAGE_EXTRAS", "").split())
    if unknown := sorted(names.difference(EXTRAS)):
        raise InstallError(f"ZIMAGE_EXTRAS names {unknown[0]!r}. It may name {' and '.join(EXTRAS)}.")
    return " ".join(sorted(names.union(before.split())))


def torch_build(before: str | None) -> str:
    """cpu or cuda: what ZIMAGE_TORCH says, else what this environment has, else what the machine has."""
    asked = os.environ.get("ZIMAGE_TORCH", "").strip().lower()
    if asked and asked not in BUILDS:
        raise InstallError(f"ZIMAGE_TORCH is {asked!r}. Set it to cpu or cuda, or leave it out.")
    if asked or before in BUILDS:
        return asked or str(before)
    driver = Path("/proc/driver/nvidia/version").exists() or bool(ask(["nvidia-smi", "-L"]))
    return "cuda" if driver and sys.platform == "linux" else "cpu"


def remove_venv(path: Path) -> None:
    """Remove an environment that can't be used; never a directory that isn't one."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "pyvenv.cfg").is_file():
        raise InstallError(f"{path} is there and is no virtual environment. Remove it, or choose another with --venv.")
    shutil.rmtree(path)


def make_venv(venv: Venv, *, anew: bool) -> None:
    """Leave a virtual environment with a supported Python there: the one that exists, or a new one."""
    if anew or python_version(str(venv.python)) not in SUPPORTED:
        if not venv.uv:
            need_venv_module()
        remove_venv(venv.path)
        say(f"creating {venv.path.name} with Python {platform.python_version()}")
        # The interpreter itself and not that of an active environment, which may be the one just removed.
        python = str(getattr(sys, "_base_executable", sys.executable))
        with_uv, with_venv = ["venv", "--quiet", "--python", python], ["-m", "venv"]
        if not run([venv.uv, *with_uv, str(venv.path)] if venv.uv else [python, *with_venv, str(venv.path)]):
            raise InstallError(f"{venv.path} could not be made (the reason is above). Mend that, then run this again.")
    if not venv.uv and not ask([str(venv.python), "-m", "pip", "--version"]):
        need_venv_module()
        if not run([str(venv.python), "-m", "ensurepip"]):
            raise InstallError(f"{venv.path} has no pip and can't get it. Remove it, then run this again.")


def need_venv_module() -> None:
    """Debian and Ubuntu leave the modules out that make virtual environments."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise InstallError(
            f"this Python can't make virtual environments. Install what it lacks (on Debian and Ubuntu "
            f"`apt-get install {package}`) or put uv on PATH, then run this again."
        )


def wheel_directories() -> list[str]:
    """The local directories where pip and uv are told to look for wheels."""
    told = [os.environ.get("PIP_FIND_LINKS", ""), os.environ.get("UV_FIND_LINKS", "")]
    told.append(ask([sys.executable, "-m", "pip", "config", "get", "global.find-links"]))
    names = dict.fromkeys(re.split(r"[\s,]+", " ".join(told)))
    return [name for name in names if name and Path(name).is_dir()]


def local_cpu_wheel(venv: Venv, version: str) -> str | None:
    """The directory with a CPU wheel of torch for the environment's Python and this machine."""
    tag = "cp" + "".join(map(str, python_version(str(venv.python))))
    fits = re.compile(rf"torch-{re.escape(version)}\+cpu-{tag}-{tag}-.*linux.*_{platform.machine()}\.whl")
    for directory in wheel_directories():
        if any(fits.fullmatch(wheel.name) for wheel in Path(directory).iterdir()):
            return directory
    return None


def need_uv(venv: Venv) -> str:
    """uv, for the one step that pip can't do; into the environment where PATH has none."""
    if venv.uv:
        return venv.uv
    say("installing uv, which knows where torch's CPU builds lie")
    if not venv.install(["uv"]):
        raise InstallError("uv could not be installed (pip's words are above). Check the network, then run this again.")
    return str(venv.scripts / "uv")


def install_torch(venv: Venv, build: str) -> None:
    """Install torch in the chosen build, before anything can ask for it and get another."""
    version = torch_version()
    plain = [f"torch=={version}", "--constraint", str(LOCK)]
    say(f"installing torch {version} for {BUILDS[build]} (this can take minutes)")
    if sys.platform != "linux":
        done = venv.install(plain, show=True)
    elif build == "cuda":
        # A CPU wheel in a find-links directory counts as the higher version, so it must be ruled out by name.
        what = [f"{plain[0]},!={version}+cpu", *plain[1:]]
        done = venv.install([*what, "--torch-backend=auto"] if venv.uv else what, show=True)
    elif directory := local_cpu_wheel(venv, version):
        what = [f"{plain[0]}+cpu", *plain[1:], "--find-links", directory]
        done = venv.install(what, show=True)
    else:
        done = venv.install([*plain, "--torch-backend=cpu"], uv=need_uv(venv), show=True)
    if not done:
        raise InstallError(
            f"torch {version} could not be installed (the reason is above). Check the network; without one, put "
            "torch's wheel into a directory and name that in PIP_FIND_LINKS. Then run this again."
        )


def install_lock(venv: Venv, lock: Path) -> None:
    """Install what the lock names and nothing else; torch's line is met by the build that is there already."""
    names = set(re.findall(r"^[\w.-]+(?===)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    say(f"installing the packages of {lock.name} (up to {len(names)})")
    if not venv.install(["--no-deps", "--requirement", str(lock)]):
        raise InstallError(
            f"the packages of {lock.name} could not be installed (the reason is above). "
            "Check the network and pip's settings, then run this again: what is done is kept."
        )


def install_extra(venv: Venv, name: str) -> None:
    """Install what an extra of pyproject.toml names, in the newest versions that go with the lock."""
    import tomllib  # not in the older Pythons that use_supported_python leaves behind

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    say(f"installing the packages of the extra {name}")
    if not venv.install([*project["optional-dependencies"][name], "--constraint", str(LOCK)]):
        raise InstallError(
            f"the extra {name} could not be installed (the reason is above). Leave it out, or try again."
        )


def install_all(path: Path, group: str | None) -> None:
    """Bring the environment to what the lock files and pyproject.toml say."""
    venv = Venv(path, shutil.which("uv"))
    before = venv.read_stamp()
    build = torch_build(before.get("torch"))
    extras = wanted_extras(before.get("extras", ""))
    wanted = {**fingerprints(group), "torch": build, "extras": extras}
    if wanted.items() <= {"extras": "", **before}.items():
        say(f"{path.name} is up to date (torch for {BUILDS[build]})")
        return
    make_venv(venv, anew=before.get("torch", build) != build)
    # Should this run break off, the next one knows which torch may be there, and that the rest isn't complete.
    venv.write_stamp({"torch": build, "extras": extras})
    install_torch(venv, build)
    install_lock(venv, LOCK)
    if group:
        install_lock(venv, TEST_LOCK)
    for name in extras.split():
        install_extra(venv, name)
    say("installing zimage itself, editable")
    if not venv.install(["--no-deps", "--editable", "."]):
        raise InstallError("zimage itself could not be installed (the reason is above). Mend it, then run this again.")
    venv.write_stamp(wanted)
    say(f"done: {venv.scripts / 'zimage'}")


def main() -> int:
    """Read the command line, install, and turn what is wrong into one sentence."""
    parser = argparse.ArgumentParser(description="Install zimage and all that it needs into a virtual environment.")
    parser.add_argument("--group", choices=["test"], help="install what the tests and checks need too")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv)")
    options = parser.parse_args()
    try:
        use_supported_python()
        install_all(options.venv.absolute(), options.group)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install: stopped. Run it again to go on where it was.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
