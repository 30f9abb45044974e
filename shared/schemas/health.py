"""What the public API tells of the services and their nodes."""

from pydantic import BaseModel, Field


class ServiceHealth(BaseModel):
    """One service as the gateway sees it."""

    status: str = Field(description="ready, starting, unreachable or not_configured", examples=["ready"])
    url: str | None = Field(default=None, examples=["http://127.0.0.1:7861"])
    reason: str | None = Field(default=None, description="Why it is not ready.")
    nodes: int = Field(default=0, description="Nodes of the service.", examples=[3])
    ready_nodes: int = Field(default=0, description="Those of them that can work now.", examples=[3])


class HealthAnswer(BaseModel):
    """`GET /health`."""

    status: str = Field(
        description="healthy when every service that is configured is ready and Redis there", examples=["healthy"]
    )
    pipeline_loaded: bool
    encoder_loaded: bool
    encoder_only_mode: bool
    services: dict[str, ServiceHealth]


class NodeEntry(BaseModel):
    """One node of a service as the gateway sees it."""

    service: str = Field(examples=["encoder"])
    url: str = Field(description="Where it answers.", examples=["http://10.0.1.7:7861"])
    state: str = Field(description="ready, starting, unreachable, other_model or draining", examples=["ready"])
    in_flight: int = Field(description="Requests of this gateway that it has now.", examples=[2])
    last_error: str | None = Field(description="What was the matter with it when something last was.")
    version: str | None = Field(description="Version of its program; null before it has answered.", examples=["0.1.0"])
    device: str | None = Field(examples=["cuda:0"])
    model: str | None = Field(description="Name of its model.", examples=["z-image-turbo"])
    fingerprint: str | None = Field(
        description="Only nodes whose models are equal get requests.", examples=["9f86d081884c7d65"]
    )


class NodesAnswer(BaseModel):
    """`GET /api/nodes`."""

    nodes: list[NodeEntry]
