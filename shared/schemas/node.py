"""`GET /v1/model`, which every service but the gateway answers: what a node is."""

from pydantic import BaseModel, Field

MODEL_PATH = "/v1/model"


class NodeFacts(BaseModel):
    """What a node works with. Nodes of one service whose fingerprints are equal can stand in for one another."""

    service: str = Field(examples=["encoder"])
    version: str = Field(description="Version of the node's program.", examples=["0.1.0"])
    name: str = Field(description="The model.", examples=["z-image-turbo"])
    device: str = Field(examples=["cpu"])
    dtype: str = Field(examples=["bfloat16"])
    fingerprint: str = Field(
        description="Equal where equal inputs give equal results, but for a device's rounding.",
        examples=["9f86d081884c7d65"],
    )
