"""run.json has the command, the versions and the machine, but no names of user or host."""

import getpass
import json
import socket

from batchnorm.runs.run import provenance


def test_it_names_command_versions_and_machine():
    found = provenance(["study", "--out", "a folder"])
    assert found["command"] == "batchnorm study --out 'a folder'"
    assert found["versions"]["torch"].startswith("2.")
    assert set(found["machine"]) == {"system", "processor", "cores"}
    assert found["machine"]["cores"] >= 1
    assert json.loads(json.dumps(found)) == found


def test_it_names_neither_user_nor_host():
    text = json.dumps({**provenance([]), "command": ""})
    assert socket.gethostname() not in text
    user = getpass.getuser()
    assert f'"{user}"' not in text


def test_a_missing_package_is_omitted(monkeypatch):
    from batchnorm.runs import run as module

    monkeypatch.setattr(module, "_version", lambda package: None if package == "torch" else "1")
    assert "torch" not in provenance([])["versions"]
