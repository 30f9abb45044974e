"""Forwards each connection to one of the gateways that the swarm's DNS names at that moment: `balancer.py NAME PORT`.

It runs in a container on the stack's network, as the swarm's own load balancer needs a part of the kernel (ip_vs) that
not every machine has. Like that it tries nothing twice. Standard library only.
"""

import asyncio
import itertools
import socket
import sys

TURNS = itertools.count()


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, there and back."""
    name, port = sys.argv[1], int(sys.argv[2])
    found = await asyncio.get_running_loop().getaddrinfo(name, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    addresses = sorted({address[0] for *_, address in found})
    there_reader, there_writer = await asyncio.open_connection(addresses[next(TURNS) % len(addresses)], port)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(pump(reader, there_writer))
            tasks.create_task(pump(there_reader, writer))
    finally:
        there_writer.close()
        writer.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes of one direction, until that side closes."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def main() -> None:
    """Serves until it is stopped."""
    server = await asyncio.start_server(forward, "0.0.0.0", 8000)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
