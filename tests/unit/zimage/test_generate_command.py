"""`zimage generate`: what it asks for, what it writes, and what it says when there is no picture."""

import base64
import io
import json
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from scripted_server import Answer, Command, Script, png, scripted_server

from tests.servers import environment, free_port, picture, run, serve, wait_until, zimage
from zimage.client import request_picture
from zimage.generate import generate
from zimage.progress import progress_bar

PNG = png(64, 48)
DRAWN = Answer(body=PNG, headers={"Content-Type": "image/png", "X-Seed": "7"})


@pytest.fixture
def server() -> Iterator[Script]:
    with scripted_server(lambda path, _: DRAWN if path == "/api/generate" else Answer(404)) as script:
        yield script


def problem(status: int, detail: str, **headers: str) -> Answer:
    body = f'{{"status": {status}, "detail": "{detail}", "code": "x"}}'.encode()
    return Answer(status, body, {"Content-Type": "application/problem+json", **headers})


def test_the_picture_is_written_and_described(
    command: Command, server: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "folder" / "out.png"
    assert command("generate", "A cat", "-o", path, "--seed", 7, "--url", server.url + "/") == 0
    assert path.read_bytes() == PNG
    assert list(path.parent.iterdir()) == [path]
    out, err = capsys.readouterr()
    assert str(path) in out.replace("\n", "")
    assert "seed 7" in out
    assert "64x48" in out
    assert out.rstrip().endswith(" s")
    assert not err


def test_only_what_is_given_is_asked_for(command: Command, server: Script, tmp_path: Path) -> None:
    assert command("generate", "A cat", "-o", tmp_path / "a.png", "--url", server.url) == 0
    assert server.fields == {"prompt": "A cat"}


def test_every_option_is_asked_for(command: Command, server: Script, tmp_path: Path) -> None:
    given = {
        "seed": 2**63 - 1,
        "width": 64,
        "height": 48,
        "steps": 3,
        "guidance_scale": 0.5,
        "shift": 2.0,
        "template": "photorealistic",
        "system_prompt": "You are a painter.",
    }
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", value)]
    assert command("generate", "A cat", "-o", tmp_path / "a.png", "--url", server.url, *flags) == 0
    assert server.fields == {"prompt": "A cat", **given}


def test_what_json_cannot_say_is_left_to_the_server_to_refuse(server: Script, tmp_path: Path) -> None:
    generate({"prompt": "\udcff", "shift": float("nan")}, tmp_path / "a.png", url=server.url, timeout_s=5, force=False)
    assert server.bodies == [rb'{"prompt": "\udcff", "shift": NaN}']


def events(*pairs: tuple[str, dict[str, object]], truncate_to: int | None = None) -> Answer:
    body = "".join(f"event: {name}\ndata: {json.dumps(fields)}\n\n" for name, fields in pairs).encode()
    return Answer(body=body, headers={"Content-Type": "text/event-stream"}, truncate_to=truncate_to)


STEPS = [("step", {"index": 0, "step": n, "steps": 2, "seconds_left": 0.1}) for n in (1, 2)]
DONE = ("done", {"index": 0, "headers": {"X-Seed": "7"}, "image_b64": base64.b64encode(PNG).decode()})


async def test_a_server_that_tells_of_its_steps_is_listened_to() -> None:
    heard: list[int] = []
    queued = ("queued", {"id": "a", "place": 1})
    with scripted_server(lambda _path, _body: events(queued, *STEPS, DONE)) as script:
        drawn = await request_picture(script.url, {}, timeout_s=5, told=lambda step: heard.append(step.step))
    assert (drawn.png, drawn.seed, heard) == (PNG, "7", [1, 2])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (events(*STEPS, ("error", {"detail": "The device has no memory left."})), "The device has no memory left."),
        (events(*STEPS), "closed the connection before the picture was done"),
        (events(*STEPS, DONE, truncate_to=200), "closed the connection before the picture was done"),
        (events(("step", {"step": "many"})), "not with a picture"),
        (events(("done", {"headers": {}, "image_b64": "%"})), "not with a picture"),
        (events(("done", {"headers": {}, "image_b64": "AAAA"})), "not with a picture"),
        (events(("error", {})), "not with a picture"),
    ],
)
def test_events_that_end_without_a_picture(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: Answer, said: str
) -> None:
    with scripted_server(lambda _path, _body: answer) as script:
        assert command("generate", "A cat", "-o", tmp_path / "a.png", "--url", script.url) == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_standard_output_gets_the_picture_alone(
    command: Command, server: Script, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert command("generate", "A cat", "-o", "-", "--url", server.url) == 0
    out, err = capsysbinary.readouterr()
    assert out == PNG
    assert b"seed 7" in err


def test_a_terminal_gets_no_picture(
    command: Command, server: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert command("generate", "A cat", "-o", "-", "--url", server.url) == 1
    assert "terminal" in capsys.readouterr().err
    assert not server.bodies


def test_a_file_is_overwritten_by_force_only(
    command: Command, server: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"mine")
    assert command("generate", "A cat", "-o", path, "--url", server.url) == 1
    assert "--force" in capsys.readouterr().err
    assert path.read_bytes() == b"mine"
    assert not server.bodies, "nothing is drawn in vain"
    assert command("generate", "A cat", "-o", path, "--url", server.url, "--force") == 0
    assert path.read_bytes() == PNG


def test_a_file_that_came_meanwhile_is_kept(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.png"

    def act(_: str, __: bytes) -> Answer:
        path.write_bytes(b"mine")
        return DRAWN

    with scripted_server(act) as server:
        assert command("generate", "A cat", "-o", path, "--url", server.url) == 1
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]
    assert "seed 7" in capsys.readouterr().err


def test_files_get_the_usual_permissions(command: Command, server: Script, tmp_path: Path) -> None:
    usual, path = tmp_path / "usual", tmp_path / "out.png"
    usual.touch()
    assert command("generate", "A cat", "-o", path, "--url", server.url) == 0
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("output", ["folder", "file/out.png", "/dev/null"])
def test_what_cannot_be_written_is_found_before_the_drawing(
    command: Command,
    server: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    output: str,
    force: list[str],
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert command("generate", "A cat", "-o", tmp_path / output, "--url", server.url, *force) == 1
    said = capsys.readouterr().err
    assert said.startswith("zimage: ")
    assert said.count("\n") == 1
    assert not server.bodies
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (problem(422, "'width' must be a multiple of 16."), "'width' must be a multiple of 16."),
        (problem(429, "The queue is full.", **{"Retry-After": "3"}), "The queue is full. Try again in 3 s."),
        (problem(503, "Not ready."), "Not ready."),
        (Answer(404, b"<html>Not here</html>"), "status 404"),
        (Answer(500, b'{"detail": [1]}'), "status 500"),
        (Answer(500, b"[]"), "status 500"),
        (Answer(301, b"", {"Location": "https://example.invalid/"}), "status 301"),
        (Answer(200, b"<html>Hello</html>"), "not with a picture"),
        (Answer(200, PNG[:12]), "not with a picture"),
        (Answer(200, PNG, truncate_to=20), "closed the connection"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_that_is_no_picture_is_one_sentence(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: Answer, said: str
) -> None:
    with scripted_server(lambda _, __: answer) as server:
        assert command("generate", "A cat", "-o", tmp_path / "out.png", "--url", server.url) == 1
    err = capsys.readouterr().err
    assert err.startswith("zimage: ")
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_server_says_how_to_start_one(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert command("generate", "A cat", "-o", tmp_path / "out.png", "--url", url) == 1
    err = capsys.readouterr().err
    assert f"no server answers at {url}" in err
    assert "zimage serve --model-path" in err


@pytest.mark.parametrize("url", ["localhost:7860", "ftp://127.0.0.1", "http://", "http://[", "http://a:b", "", "/x"])
def test_a_url_that_is_none_is_one_sentence(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert command("generate", "A cat", "-o", tmp_path / "out.png", "--url", url) == 1
    assert "is not the address of a server" in capsys.readouterr().err


def test_a_proxy_is_not_asked_for_this_machine(
    command: Command, server: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        assert command("generate", "A cat", "-o", tmp_path / "out.png", "--url", url, "--force") == 0


def test_a_slow_server_is_given_up(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def act(_: str, __: bytes) -> Answer:
        time.sleep(1)
        return DRAWN

    with scripted_server(act) as server:
        assert command("generate", "A cat", "-o", tmp_path / "out.png", "--url", server.url, "--timeout", 0.2) == 1
    assert "--timeout" in capsys.readouterr().err


@pytest.fixture
def heeded_ctrl_c() -> Iterator[None]:
    """What is started hears SIGINT, which a shell lets its commands in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_ctrl_c")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    ended = threading.Event()

    def act(_: str, __: bytes) -> Answer:
        ended.wait(60)
        return DRAWN

    with scripted_server(act) as server:
        arguments = zimage("generate", "A cat", "-o", tmp_path / "out.png", "--url", server.url)
        with subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: server.bodies, "the server is asked")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
            ended.set()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("total", "steps"), [(None, ""), (9, "2/9")])
def test_steps_are_shown_where_they_are_known(total: int | None, steps: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bar(console) as progress:
        progress.add_task("Drawing", total=total, completed=2)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Drawing" in shown
    assert steps in shown
    assert "/?" not in shown


@pytest.mark.slow
def test_a_real_server_draws_what_the_api_draws(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with serve(tiny_checkpoint, tmp_path / "data") as server:
        flags = ["--url", server.url, "--width", "64", "--height", "64", "--steps", "2", "--seed", "7"]
        prompt = picture()["prompt"]
        drawn = run(zimage("generate", prompt, "-o", "out.png", *flags), tmp_path)
        assert drawn.status == 0, drawn.stderr
        with server.client() as client:
            assert (tmp_path / "out.png").read_bytes() == client.post("/api/generate", json=picture()).content
        refused = run(zimage("generate", prompt, "-o", "no.png", "--url", server.url, "--width", "17"), tmp_path)
        assert refused.status == 1
        assert refused.stderr == "zimage: 'width' must be a multiple of 16.\n"
        assert not (tmp_path / "no.png").exists()
