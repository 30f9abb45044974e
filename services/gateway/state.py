"""What a request finds in `request.state`, and the dependencies that hand it to routes."""

from typing import Annotated, TypedDict

from fastapi import Depends, Request

from services.gateway.engine import GatewayEngine
from services.gateway.store import History
from services.gateway.watch import Watch
from shared.errors import Unready


class State(TypedDict):
    """Made by the lifespan of the app."""

    engine: GatewayEngine
    watch: Watch
    history: History | None


async def _engine(request: Request) -> GatewayEngine:
    engine: GatewayEngine = request.state.engine
    return engine


async def _watch(request: Request) -> Watch:
    watch: Watch = request.state.watch
    return watch


async def _history(request: Request) -> History:
    history: History | None = request.state.history
    if history is None:
        raise Unready("This server keeps no history: it was started without Redis.")
    return history


Kept = Annotated[History, Depends(_history)]
Engine = Annotated[GatewayEngine, Depends(_engine)]
Services = Annotated[Watch, Depends(_watch)]
