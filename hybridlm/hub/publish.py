"""Publish a model folder: check it, show what would be uploaded, upload it so that it can go on after a break.

`HfApi.upload_folder` is what resumes, in every version of huggingface_hub that is supported: run again, it leaves out
files that the repository has and large files whose content the storage has. (`upload_large_folder` keeps its own notes
in the folder, and is gone from version 2.)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hybridlm.evaluation.loading import file_hash

from .cards import LEDGER, template_hash, template_text
from .figures import CardError, read_json
from .golden import read_golden
from .safety import folder_files, secrets, too_large
from .verify import load_problems, verify

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


@dataclass(frozen=True)
class Upload:
    """A file that would be uploaded.

    Attributes:
        path: In the repository.
        size: In bytes.
        sha256: Of its content.
    """

    path: str
    size: int
    sha256: str


def check_publishable(folder: str | Path, *, run: bool = True) -> list[str]:
    """Why a folder must not be published; see `verify` for what is looked at beside secrets and sizes.

    Args:
        folder: The model folder.
        run: Whether to load it.
    """
    folder = Path(folder)
    problems = verify(folder, run=False)
    problems += _outdated(folder)
    problems += secrets(folder, [token for token in (get_token(),) if token])
    problems += too_large(folder)
    return problems or (load_problems(folder, read_golden(folder)) if run else [])


def _outdated(folder: Path) -> list[str]:
    """Whether the card is of another template, so that its list of figures cannot be compared."""
    try:
        ledger = read_json(folder / LEDGER)
    except CardError:
        return []  # which was said
    if not isinstance(ledger, dict) or ledger.get("template") == template_hash(template_text()):
        return []
    return [f"{LEDGER}: the card was rendered from another template; `hybridlm card FOLDER` renders it again"]


def uploads(folder: str | Path) -> list[Upload]:
    """The files of a folder, as they would be uploaded."""
    folder = Path(folder)
    return [
        Upload(path.relative_to(folder).as_posix(), path.stat().st_size, file_hash(path))
        for path in folder_files(folder)
        if path.is_file()
    ]


def check_repo(repo: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        ValueError: It is none.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo: {error}") from error
    if repo.count("/") != 1:
        raise ValueError(f"--repo: {repo!r}: expected ORG/NAME")


def upload(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    said: Callable[[str], None] = lambda text: None,
) -> str:
    """Upload a folder that was checked; after a break, the same call goes on.

    Args:
        folder: The model folder.
        repo: `ORG/NAME`; made if it does not exist.
        private: Make it private; a repository that is public is refused.
        revision: A branch, made if it does not exist.
        said: Called with a line of text as things go on.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The name is wrong, or there is no token.
        OSError: The Hub cannot be reached or refuses; without the token in its message.
    """
    check_repo(repo)
    if constants.is_offline_mode():
        raise OSError("HF_HUB_OFFLINE is set: nothing can be uploaded; unset it")
    token = get_token()
    if token is None:
        raise ValueError("no token: `hf auth login` stores one, or set HF_TOKEN")
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    known_private = _quietly(token, repo, lambda: _visibility(api, repo))
    if private and known_private is False:
        raise ValueError(f"--private: {repo} exists and is public; make it private first, or leave the option out")

    def send() -> str:
        if known_private is None:
            api.create_repo(repo, private=private, exist_ok=True)
            said(f"made the {'private' if private else 'public'} repository {repo}")
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        message = "Upload with hybridlm publish"
        return api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message).commit_url

    return _quietly(token, repo, send)


def _visibility(api: HfApi, repo: str) -> bool | None:
    """Whether a repository is private; `None` if there is none."""
    try:
        return bool(api.repo_info(repo).private)
    except RepositoryNotFoundError:
        return None


def _quietly(token: str, repo: str, call: Callable[[], Any]) -> Any:
    """Call the Hub; an error becomes one line that does not hold the token, and keeps no error that may.

    Raises:
        OSError: The Hub cannot be reached or refuses.
    """
    try:
        return call()
    except Exception as error:  # of the client for HTTP, which differs between versions, and of the storage's library
        causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
    reason = redact("; ".join(f"{type(cause).__name__}: {cause}" for cause in causes), token)
    raise OSError(f"{repo}: {reason}; the same command goes on where it was")


def redact(text: str, token: str) -> str:
    """A text without the token, nor anything that looks like one."""
    return _TOKEN.sub("hf_…", text.replace(token, "hf_…"))
