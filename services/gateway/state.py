"""What a request finds in `request.state`, and the dependencies that hand it to routes."""

from typing import Annotated, TypedDict

from fastapi import Depends, Request

from services.gateway.engine import GatewayEngine
from services.gateway.watch import Watch


class State(TypedDict):
    """Made by the lifespan of the app."""

    engine: GatewayEngine
    watch: Watch


def _engine(request: Request) -> GatewayEngine:
    engine: GatewayEngine = request.state.engine
    return engine


def _watch(request: Request) -> Watch:
    watch: Watch = request.state.watch
    return watch


Engine = Annotated[GatewayEngine, Depends(_engine)]
Services = Annotated[Watch, Depends(_watch)]
