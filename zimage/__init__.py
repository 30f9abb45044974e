"""The command `zimage`: runs the services on one machine, or one of them, and makes checkpoints to try them with.

It starts the services as processes and speaks to them over HTTP, like anyone else.
"""
