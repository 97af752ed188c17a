"""One commit or none: sends a folder, and after a failure says why and leaves the remote as it was.

`HfApi.upload_folder` may split a folder over several commits; `create_commit` never does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..startup.one_line import one_line
from .contents import REPLACED, matches

REASONS = {
    401: "the token is missing, wrong or expired: run `hf auth login`, set `HF_TOKEN`, or pass `token`",
    403: "the token may not write there: use one with write access, or a name that is yours",
    404: "the repository or its branch is not there: check the name, and whether the token may see it",
    409: "somebody made a repository of this name meanwhile, or the Hub is busy with it: push again",
    412: "somebody else committed meanwhile: look at their commit, and push again",
    413: "the files are larger than the Hub takes: see its storage limits",
    429: "the Hub was asked too often: wait, and push again",
    507: "the owner's storage is full: make room, or push to another owner",
}


class PushError(OSError):
    """A push failed; the message says why, and in which state the repository is."""


class Remote:
    """The repository of a push: notes its state before, and restores that state after a failure.

    Args:
        api: client with the token of the push.
        repo_id: "owner/name".
        revision: branch to commit to.
    """

    def __init__(self, api: HfApi, repo_id: str, revision: str | None) -> None:
        self.api, self.repo_id, self.revision = api, repo_id, revision
        self.is_made = False  # by us
        self.head: str | None = None
        self.files: list[str] = []

    def look(self) -> None:
        """Notes the last commit and what is in it; a repository that does not exist has none."""
        with self._explained():
            if self.api.repo_exists(self.repo_id):
                self._read()

    def commit(self, folder: Path, message: str, private: bool | None) -> CommitInfo:
        """Sends the folder as the one successor of what `look` saw, in a new repository if there was none."""
        added = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        with self._explained():
            if self.head is None:
                # Not `exist_ok`: a repository that somebody else makes right now is not ours to remove.
                self.api.create_repo(self.repo_id, private=private)
                self.is_made = True
                self._read()
            stale = [name for name in self.files if matches(name, REPLACED) and name not in added]
            return self.api.create_commit(
                self.repo_id,
                [
                    *(CommitOperationAdd(name, path) for name, path in sorted(added.items())),
                    *(CommitOperationDelete(name, is_folder=False) for name in stale),
                ],
                commit_message=message,
                revision=self.revision,
                parent_commit=self.head,
            )

    def _read(self) -> None:
        info = self.api.model_info(self.repo_id, revision=self.revision)
        self.head, self.files = info.sha, [file.rfilename for file in info.siblings or []]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = explain(error, self.api.endpoint)
            raise PushError(f"`{self.repo_id}` was not pushed: {reason}. {self._restore()}") from error
        except BaseException:  # Ctrl-C
            self._restore()
            raise

    def _restore(self) -> str:
        """Removes a repository that was made for nothing; says what is true now."""
        try:
            if self.head is not None and self.api.model_info(self.repo_id, revision=self.revision).sha != self.head:
                return "There is a new commit, perhaps this one: look at it before you push again."
            if self.is_made:
                self.api.delete_repo(self.repo_id)
                return "The repository that was made for it is removed again."
        except Exception:  # the Hub cannot be asked
            kept = (
                "the empty repository may still be there" if self.is_made else "whether anything arrived is not known"
            )
            return f"As the Hub does not answer, {kept}: look at {self.api.endpoint}/{self.repo_id}."
        return "Nothing was written." if self.head is None else "The repository is as it was."


def explain(error: BaseException, endpoint: str) -> str:
    """Half a sentence: why the Hub, or the way there, refused."""
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        return one_line(error).rstrip(".:")  # what the Hub said of the card's metadata or of a large file
    cause: BaseException | None = error
    while cause is not None:
        last, cause = cause, cause.__cause__
        if isinstance(last, HfHubHTTPError) and last.response is not None:
            status, said = last.response.status_code, (last.server_message or "")
            other = (
                "the Hub has a problem of its own: push again later" if status >= 500 else "the Hub does not take it"
            )
            said = f": {one_line(said).rstrip('.:')}" if said else ""
            return f"{REASONS.get(status, other)} (status {status}{said})"
    return f"the connection to {endpoint} failed: check it, and push again ({type(last).__name__}: {one_line(last)})"
