"""Pushes that fail half-way: one sentence says why, and the remote is as it was."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay_hf import PushError, push
from relay_hf.cli import main

from .hub_server import READ_ONLY_TOKEN, Commit, HubServer

LARGE_BATCH, PUT, COMMIT = r"POST /me/relay\.git/info/lfs", "PUT /large/", "POST /api/models/me/relay/commit"
FAILURES = [
    ({"request": "POST /api/models/me/relay/preupload", "status": 403, "message": "Nope"}, "may not write .*403: Nope"),
    (
        {"request": LARGE_BATCH, "status": 413, "message": "Over quota"},
        r"larger than the Hub takes.*\(status 413: Over",
    ),
    ({"request": PUT, "status": 500, "message": "Disk"}, r"problem of its own: push again later \(status 500: Disk\)"),
    ({"request": PUT}, "connection to http://127.0.0.1:.* failed"),
    ({"request": "POST /large/verify", "status": 404}, "is not there"),
    ({"request": COMMIT, "status": 507, "message": "Full"}, "storage is full.*Full"),
    ({"request": COMMIT, "status": 429}, "asked too often"),
    ({"request": COMMIT, "status": 400, "message": "Strange"}, r"the Hub does not take it \(status 400: Strange\)"),
    ({"request": "POST /api/validate-yaml", "status": 400}, "pushed: Invalid metadata in README.md"),
    ({"request": COMMIT}, "connection to .* failed"),
]


@pytest.mark.parametrize(
    ("failure", "message", "is_new"),
    [(*case, True) for case in FAILURES] + [(*case, False) for case in (FAILURES[2], FAILURES[3], FAILURES[5])],
)
def test_failed_push_leaves_remote_as_it_was(
    failure: dict[str, Any],
    message: str,
    is_new: bool,
    hub: HubServer,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    if not is_new:
        push(folder, "me/relay")
        hub.large.clear()
        (folder / "README.md").write_text("# Changed")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes().replace(b'"format":"pt"', b'"format":"PT"'))
    before = hub.snapshot()
    with hub.fail(**failure), pytest.raises(PushError, match=message) as caught:
        push(folder, "me/relay")
    assert hub.snapshot() == before
    said = "that was made for it is removed again." if is_new else "The repository is as it was."
    assert str(caught.value).endswith(said)
    assert str(caught.value).startswith("`me/relay` was not pushed: ")
    push(folder, "me/relay")  # and now it works
    assert len(hub.repositories["me/relay"].commits) == (2 if is_new else 3)


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("wrong", "me/relay", r"token is missing, wrong or expired.*\(status 401"),
        (READ_ONLY_TOKEN, "me/relay", r"may not write there.*\(status 403: You don't have the rights"),
        (None, "somebody/relay", r'under the namespace "somebody"'),
    ],
)
def test_refused_token_or_name_is_told_and_nothing_is_made(
    token: str | None, repo_id: str, message: str, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PushError, match=message) as caught:
        push(folder, repo_id, token=token)
    assert hub.repositories == {}
    assert str(caught.value).endswith("Nothing was written.")


def test_read_only_token_cannot_change_a_repository(hub: HubServer, folder: Path) -> None:
    push(folder, "me/relay")
    before = hub.snapshot()
    (folder / "README.md").write_text("# Changed")
    with pytest.raises(PushError, match="may not write there"):
        push(folder, "me/relay", token=READ_ONLY_TOKEN)
    assert hub.snapshot() == before


def test_branch_that_is_not_there_is_told(hub: HubServer, folder: Path) -> None:
    push(folder, "me/relay")
    with pytest.raises(PushError, match="the repository or its branch is not there"):
        push(folder, "me/relay", revision="nowhere")


def test_commit_of_somebody_else_meanwhile_wins(hub: HubServer, folder: Path) -> None:
    push(folder, "me/relay")
    (folder / "README.md").write_text("# Changed")
    commits = hub.repositories["me/relay"].commits

    def somebody_commits() -> None:
        commits.append(Commit("Theirs", {**commits[-1].files, "theirs.txt": b""}))

    with (
        hub.intercept(COMMIT, somebody_commits),
        pytest.raises(PushError, match=r"somebody else committed meanwhile.* There is a new commit"),
    ):
        push(folder, "me/relay")
    assert [commit.message for commit in commits][-1] == "Theirs"


def test_repository_that_somebody_makes_meanwhile_is_not_removed(hub: HubServer, folder: Path) -> None:
    taken = hub.fail("POST /api/repos/create", 409, "You already created this model repo")
    with taken, pytest.raises(PushError, match="somebody made a repository of this name meanwhile"):
        push(folder, "me/relay")
    assert not [request for request in hub.requests if request.startswith("DELETE")]


def test_answer_to_the_commit_lost_says_that_there_is_one(hub: HubServer, folder: Path) -> None:
    hub.loses_answers_to = COMMIT
    with pytest.raises(PushError, match="There is a new commit, perhaps this one"):
        push(folder, "me/relay")
    assert len(hub.repositories["me/relay"].commits) == 2  # kept, although the repository was new


def test_hub_gone_says_what_may_be_left(hub: HubServer, folder: Path) -> None:
    def gone() -> None:
        hub.interceptions.append((".*", gone))  # from the first upload on, everything
        raise ConnectionAbortedError

    with hub.intercept(PUT, gone), pytest.raises(PushError, match="the empty repository may still be there: look at"):
        push(folder, "me/relay")
    with hub.intercept(PUT, gone), pytest.raises(PushError, match="whether anything arrived is not known: look at"):
        push(folder, "me/relay")


def test_command_line_failure_is_one_sentence_and_exit_code_2(
    hub: HubServer, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    with hub.fail(COMMIT, 403, "Nope"):
        assert main(["push", str(folder), "me/relay"]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("relay-hf: error: `me/relay` was not pushed: the token may not write there")


def test_interrupted_push_removes_the_repository_it_made(
    hub: HubServer, folder: Path, hub_environment: Callable[[HubServer], dict[str, str]]
) -> None:
    script = Path(sys.executable).with_name("relay-hf")
    command = [script, "push", folder, "me/relay"]
    process = subprocess.Popen(
        command,
        env=hub_environment(hub),
        stderr=subprocess.PIPE,
        text=True,
        # Shells start what runs in their background without it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def interrupt() -> None:
        os.kill(process.pid, signal.SIGINT)
        raise ConnectionAbortedError

    with hub.intercept(PUT, interrupt):
        _, said = process.communicate(timeout=100)
    assert process.returncode not in (0, 2), said
    assert any(request.startswith("PUT") for request in hub.requests)
    assert hub.repositories == {}


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "model.safetensors", ".eval_results", "vocab.json"])
def test_link_out_of_the_folder_raises_and_nothing_is_sent(
    name: str, hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "private"
    if name == ".eval_results":
        outside.mkdir()
        (outside / "a.yaml").write_text("secret")
    else:
        outside.write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    before = hub.snapshot()
    with pytest.raises(ValueError, match=r"is a link to `.*private`, out of the folder: put a copy there"):
        push(folder, "me/relay")
    assert hub.snapshot() == before


def test_link_within_the_folder_is_followed(hub: HubServer, folder: Path) -> None:
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "whole.safetensors")
    (folder / "model.safetensors").symlink_to(folder / "weights" / "whole.safetensors")
    push(folder, "me/relay")
