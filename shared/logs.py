"""Structured logs: readable on a terminal, one JSON object a line otherwise, each with the request's id.

Everything that logs through the standard library (uvicorn, transformers, diffusers) comes out in the same form.
"""

import logging
import os
import sys
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor

LogFormat = Literal["auto", "console", "json"]

_QUIETER = ("httpcore2", "httpx2", "uvicorn.error", "urllib3")
_SILENT = ("diffusers.quantizers.torchao", "torch.utils._pytree", "torchao")
"""While they are imported they warn of torchao and its kernels, which are nobody's affair here; `adopt_loggers` would
come too late."""


def configure_logs(service: str, *, log_format: LogFormat = "auto", debug: bool = False) -> None:
    """Sets up logging of this process to standard error; called once, before anything logs."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _naming(service),
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.INFO),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *(_console_rendering() if console else _json_rendering()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    for name in _QUIETER:
        logging.getLogger(name).setLevel(logging.INFO if debug and name == "uvicorn.error" else logging.WARNING)
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        _stop_progress_bars()
    structlog.contextvars.clear_contextvars()


def adopt_loggers() -> None:
    """Takes the handlers for the terminal off libraries that brought their own; they log as all others do then."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger):
            continue
        for handler in list(logger.handlers):
            if getattr(handler, "stream", None) in (sys.stderr, sys.stdout):
                logger.removeHandler(handler)
                logger.propagate = True


def _stop_progress_bars() -> None:
    """Those of libraries, which in a file would stand between the lines and in them.

    A library that comes later reads the variable; one that is here already has read it.
    """
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for library in ("transformers", "diffusers"):
        module = sys.modules.get(f"{library}.utils.logging")
        if module is not None:
            module.disable_progress_bar()


def _naming(service: str) -> Processor:
    """Names the service in every line, also in those of threads, which have no context of their own."""

    def add_service(_: Any, __: str, event: EventDict) -> EventDict:
        event["service"] = service
        return event

    return add_service


def _console_rendering() -> list[Processor]:
    # plain, as the pretty ones show locals, which hold prompts, keys and megabytes
    return [
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
    ]


def _json_rendering() -> list[Processor]:
    traces = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [structlog.processors.ExceptionRenderer(traces), structlog.processors.JSONRenderer()]
