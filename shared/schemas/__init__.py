"""The bodies of requests and answers: pydantic models at the edge, the same at the gateway and at the services."""
