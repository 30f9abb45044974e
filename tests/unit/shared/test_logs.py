import json
import logging
import sys
from collections.abc import Iterator

import pytest

from shared.logs import adopt_loggers, configure_logs

LIBRARY = "a_library_with_a_handler"


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    logging.root.manager.loggerDict.pop(LIBRARY)


def test_a_library_that_brings_its_own_handler_logs_as_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("encoder", log_format="json")
    library = logging.getLogger(LIBRARY)
    library.addHandler(logging.StreamHandler(sys.stderr))
    library.propagate = False
    adopt_loggers()
    library.warning("it is %s", "told once")
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert (told["event"], told["level"], told["service"]) == ("it is told once", "warning", "encoder")


def test_what_is_not_for_the_terminal_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("encoder", log_format="json")
    library, handler = logging.getLogger(LIBRARY), logging.NullHandler()
    library.addHandler(handler)
    library.propagate = False
    adopt_loggers()
    library.warning("it goes elsewhere")
    assert library.handlers == [handler]
    assert capsys.readouterr().err == ""
