"""An exported folder -> a repository of the hub. The token comes from HF_TOKEN or the login, and is in no message of ours."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelInfo, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from rich.console import Console

from gist_train.config.errors import Fault, UserError, shown
from gist_train.progress import counting, say
from gist_train.results.licences import unfit_for_hub

WHERE = "--push-to-hub"
STALE = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "onnx/*", "openvino/*", "[0-9]_*/*"]
"""Weights and modules of an earlier export: left beside ours, a loader of another format would read the old model. What else
its owner keeps there (licence, pictures, other files) stays; so does all of it in the repository's history."""
BARE = {".gitattributes", ".gitignore", "README.md", "LICENSE"}
"""Files of a repository that holds no model yet."""
USERS_FAULT = {
    401: ("a token that the hub does not know", "log in with `hf auth login`, or set HF_TOKEN to a token that is still valid"),
    402: ("an account that must pay for this", "see the account's plan and storage on the hub"),
    403: ("a token that may not write there", "use a token with write permission for this user or organization, or another name"),
    404: ("a user, organization or repository that is not there", "correct the name, or use a token that may see it"),
}
"""HTTP status -> what it says of the user's input, and what fixes it."""


def check_push(repo_id: str | None, private: bool | None, *, dry_run: bool = False) -> None:
    """Refuses, before any work is done, what could not be pushed; asks the hub whose token it is.

    Args:
        repo_id: USER/NAME; None where nothing is to be pushed.
        private: visibility of a new repository; None for the account's default.
        dry_run: whether it was asked only what would be pushed.

    Raises:
        UserError: no such name can exist, there is no token, the hub does not know it, or it may only read.
        ConnectionError: the hub can't be reached, or fails.
    """
    if repo_id is None:
        if private is not None:
            flag = "--private" if private else "--no-private"
            raise UserError(Fault(flag, "no --push-to-hub", "both, or neither", f"add {WHERE} USER/NAME"))
        if dry_run:
            raise UserError(Fault("--dry-run", "no --push-to-hub", "both, or neither", f"add {WHERE} USER/NAME"))
        return
    reason = unfit_for_hub(repo_id) or (None if "/" in repo_id else "a name without a user or organization")
    if reason is not None:
        expected = "USER/NAME or ORGANIZATION/NAME, in letters, digits and - _ . only, 96 characters at most"
        raise UserError(Fault(WHERE, f"{shown(repo_id)}: {shown(reason, 200)}", expected, "name it so"))
    with _hub_faults(repo_id) as token:
        account = HfApi(token=token).whoami()
    access = (account.get("auth") or {}).get("accessToken") or {}  # a login by OAuth has none
    if access.get("role") == "read":
        raise UserError(Fault(WHERE, "a token that may only read", "one that may write", USERS_FAULT[403][1]))


@dataclass(frozen=True, slots=True)
class Push:
    """What a push would do."""

    repo_id: str
    exists: bool
    private: bool | None
    """Of a repository that exists, whether it is; of a new one, what was asked; None for the account's default."""
    sends: dict[str, int]
    """File -> bytes."""
    deletes: list[str]
    """Files of an earlier export that the repository holds and the folder has not."""

    def __str__(self) -> str:
        seen = {True: "private ", False: "public ", None: ""}[self.private]
        repository = f"the {seen}repository {self.repo_id}" if self.exists else f"a new {seen}repository, {self.repo_id}"
        lines = [f"would push to {repository}: {len(self.sends):,} files, {sum(self.sends.values()) / 1e6:,.1f} MB"]
        lines += [f"  {size:>15,} bytes  {name}" for name, size in sorted(self.sends.items())]
        lines += [f"  would delete            {name}" for name in self.deletes]
        return "\n".join(lines)


def planned_push(folder: Path, repo_id: str, *, private: bool | None) -> Push:
    """What `push_folder` would do with the same arguments, which raise the same; nothing is made or sent."""
    with _hub_faults(repo_id) as token:
        api = HfApi(token=token)
        try:
            repository = _fitting(api.model_info(repo_id), repo_id, private=private)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            repository = None
        names = set() if repository is None else _names(repository)
        sends = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        gone = [name for name in sorted(names - sends.keys()) if any(fnmatch(name, pattern) for pattern in STALE)]
    return Push(repo_id, repository is not None, private if repository is None else repository.private, sends, gone)


def _names(repository: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in repository.siblings or []}


def _fitting(repository: ModelInfo, repo_id: str, *, private: bool | None) -> ModelInfo:
    """The same repository, if an export may be pushed there.

    Raises:
        UserError: it is public, and `private` was asked for; or it holds something else than a sentence-transformers model.
    """
    names = _names(repository)
    if private and not repository.private:
        # Asking for a private one changes nothing at a repository that exists, and the hub says no word about it.
        fix = "make it private on the hub, name another, or leave --private out"
        raise UserError(Fault(WHERE, f"{repo_id}, which is public", "a private or a new repository", fix))
    if names - BARE and "modules.json" not in names:
        holds = f"{repo_id}, which holds something else: {shown(', '.join(sorted(names - BARE)))}"
        raise UserError(Fault(WHERE, holds, "a new repository, or an earlier export", "name another"))
    return repository


def push_folder(folder: Path, repo_id: str, *, private: bool | None, console: Console) -> str:
    """Makes the repository where there is none, and commits the exported `folder` to it. Returns the commit's address.

    In a repository that exists, weights and modules that the folder does not have are deleted, all else is left.

    Args:
        private: visibility of a new repository; None for the account's default.
        console: where it is said what is sent, and that it still is.

    Raises:
        UserError: no permission; the repository holds something else than a sentence-transformers model; or it is public, and
            `private` was asked for. Nothing was uploaded then.
        ConnectionError: the hub can't be reached, or fails. The folder stays as it is.
    """
    origin = ModelCard.load(folder / "README.md").data["gist_train"]
    message = f"gist-train export: run {origin['run']}, step {origin['step']}"
    with _hub_faults(repo_id, f" The export itself is whole: {folder}") as token:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        names = _names(_fitting(api.model_info(repo_id), repo_id, private=private))
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        what = f"pushing {len(sizes):,} files, {sum(sizes) / 1e6:,.1f} MB, to {repo_id}"
        say(console, what)
        with counting(what, None, console, passing=True):
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=STALE if names else None
            )
    return str(commit.commit_url)


@contextmanager
def _hub_faults(repo_id: str, standing: str = "") -> Iterator[str]:
    """Yields the token, and says what goes wrong at the hub without it: as the user's fault, or as a failure.

    Args:
        standing: a sentence on what is safe.
    """
    token = None
    try:
        token = _token()
        yield token
    except UserError:
        raise
    except Exception as error:  # also of the HTTP library of the day and of the upload's threads, which share no class
        if isinstance(error, MemoryError):
            raise
        # The chain of errors is cut: what the HTTP library raises may hold the header with the token in it.
        raise _in_words(error, repo_id, token, standing) from None


def _token() -> str:
    """The token of HF_TOKEN or of the login.

    Raises:
        UserError: there is none, or one that no header can hold.
    """
    token = get_token()
    if token is None:
        raise LocalTokenNotFoundError
    if not re.fullmatch(r"[!-~]+", token):
        fix = "set HF_TOKEN again, or log in with `hf auth login`"
        raise UserError(
            Fault(WHERE, "a token with a space or a character outside ASCII in it", "the token as the hub shows it", fix)
        )
    return token


def _in_words(error: Exception, repo_id: str, token: str | None, standing: str) -> Exception:
    cause: BaseException = error
    while not isinstance(cause, HfHubHTTPError | OfflineModeIsEnabled) and cause.__cause__ is not None:
        cause = cause.__cause__  # what a thread of the upload met
    expected = f"a token that may write to {repo_id}"
    if isinstance(cause, OfflineModeIsEnabled):
        return UserError(Fault(WHERE, "HF_HUB_OFFLINE, which is set", "a connection to the hub", "unset it, or push later"))
    if isinstance(cause, LocalTokenNotFoundError):
        return UserError(Fault(WHERE, "no token", expected, "log in with `hf auth login`, or set HF_TOKEN"))
    reason = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        said = f": {_clean(cause.server_message, token)}" if cause.server_message else ""
        if status in USERS_FAULT:
            found, fix = USERS_FAULT[status]
            return UserError(Fault(WHERE, f"{found} (HTTP {status}{said})", expected, f"{fix}.{standing}"))
        reason = f"HTTP {status}{said}"
    where = f"the hub at {constants.ENDPOINT}"
    return ConnectionError(f"{WHERE} {repo_id}: {where} did not take it: {_clean(reason, token)}. Try again later.{standing}")


def _clean(text: str, token: str | None) -> str:
    """`text` on one line, short, without the token: a server may send back what it was sent."""
    if token:
        text = text.replace(token, "<token>")
    return shown(re.sub(r"Bearer \S+", "Bearer <token>", text), 300).strip('"')
