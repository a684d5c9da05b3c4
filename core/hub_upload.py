"""One upload of a folder to the Hugging Face Hub: what is to be sent, in one commit, and every step repeatable.

docs/decisions/0016-one-commit-a-push.md says why it goes through `HfApi.create_commit`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, ModelError
from .files import MARKERS, STALE
from .hub_errors import HubError, bounded_creation, expected, meaning, persist, remedy, status

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
# What Sentence Transformers writes for a model that has no name on the Hub yet.
PLACEHOLDERS = ("sentence_transformers_model_id", "cross_encoder_model_id")
_PULL_REQUEST = "refs/pr/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Where a folder goes, and how.

    Args:
        repo_id: NAME or OWNER/NAME; a bare name is the token's owner's.
        token: A token, or None for the one that `hf auth login` left or `HF_TOKEN` holds.
        private: Whether a new repository is private. None leaves it to the account. One that exists has to be so.
        commit_message: The commit's title, and a pull request's.
        commit_description: Its text.
        revision: A branch, made from main if it is not there, or an open pull request's "refs/pr/N". None is main.
        create_pr: Open a pull request instead of writing to main.
        exist_ok: Whether the repository may be there already.
        replace_card: Whether this card takes the place of one that is there.
    """

    repo_id: str
    token: str | None = None
    private: bool | None = None
    commit_message: str = "Add model"
    commit_description: str | None = None
    revision: str | None = None
    create_pr: bool = False
    exist_ok: bool = True
    replace_card: bool = False


def checked(push: Push) -> Push:
    """The same with the repository's full name; nothing is written and nothing made yet.

    Raises:
        ConfigError: If the name is none, what is asked for excludes itself, or there is no token.
        HubError: If the Hub does not say whose token it is, which a bare name needs.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(push.repo_id)
    except HFValidationError as error:
        fix = "Write OWNER/NAME of letters, digits, '-', '_' and '.'"
        raise ConfigError(f"{push.repo_id!r} names no repository", where="repo_id", fix=fix) from error
    if push.create_pr and push.revision not in (None, "main"):
        what = f"a pull request goes to main, not to {push.revision!r}"
        raise ConfigError(what, where="create_pr, revision", fix="Pass one of them")
    if not push.token and get_token() is None:
        fix = "Run `hf auth login`, set HF_TOKEN or pass token="
        raise ConfigError("there is no token for the Hub", where=f"push to {push.repo_id}", fix=fix)
    if "/" in push.repo_id:
        return push
    try:
        owner = persist("asking whose token it is", HfApi(token=push.token).whoami)["name"]
    except Exception as error:
        if not expected(error):
            raise
        raise HubError(meaning(error), where=f"push to {push.repo_id}", fix=remedy(error)) from error
    return replace(push, repo_id=f"{owner}/{push.repo_id}")


def files_of(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its path there.

    Raises:
        ModelError: If there is none, or the card's head is not YAML.
    """
    if not folder.is_dir():
        raise ModelError("is not a folder", where=str(folder), fix="Pass the folder of a saved model")
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {name: path for name, path in found.items() if not {".git", ".cache"} & set(Path(name).parts)}
    if not kept:
        raise ModelError("holds no files", where=str(folder), fix="Pass the folder of a saved model")
    if CARD in kept:
        _check_card(kept[CARD])
    return kept


def _check_card(path: Path) -> None:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (ValueError, TypeError, YAMLError) as error:
        what = f"its head is not metadata that the Hub reads ({' '.join(str(error).split())})"
        raise ModelError(what, where=str(path), fix="Mend what stands between the lines of ---") from error


class Upload:
    """One push of one folder; every step can be done once more."""

    def __init__(self, push: Push, files: Mapping[str, Path]) -> None:
        from huggingface_hub import HfApi

        self.push, self.files = push, dict(files)
        self.api: HfApi = HfApi(token=push.token)
        self.revision = push.revision
        self.made = False
        self.pull_request: str | None = None
        self.told: set[str] = set()

    def run(self) -> str:
        self._repository()
        return persist("uploading", self._send)

    def _repository(self) -> None:
        """See that repository and branch are there."""
        push, api = self.push, self.api
        may_exist = push.exist_ok or push.create_pr

        def create() -> None:
            with bounded_creation():
                api.create_repo(push.repo_id, private=push.private, exist_ok=may_exist)

        try:
            # One that was made by a request whose answer got lost cannot be told from somebody else's.
            persist("creating the repository", create, repeatable=may_exist)
        except Exception as error:
            if not may_exist and status(error) == 409:
                fix = "Pass exist_ok=True to push into it, or choose another name"
                raise ConfigError("the repository is there already", where=push.repo_id, fix=fix) from error
            raise
        self.made = True
        if push.private is not None:
            there = persist("looking at the repository", lambda: api.model_info(push.repo_id)).private
            if there is not None and bool(there) != push.private:
                what = f"the repository is {'private' if there else 'public'} already"
                fix = "Change that in its settings on the Hub, or leave private out"
                raise ConfigError(what, where=f"{push.repo_id}, private={push.private}", fix=fix)
        if (branch := push.revision) is not None and branch != "main" and not branch.startswith(_PULL_REQUEST):
            persist(
                "creating the branch", lambda: api.create_branch(repo_id=push.repo_id, branch=branch, exist_ok=True)
            )

    def _send(self) -> str:
        """Look what is there, send what is not, commit."""
        from huggingface_hub import CommitOperationDelete

        push, api = self.push, self.api
        there = self._there()
        added = self._additions(there)
        removed = [CommitOperationDelete(path_in_repo=name) for name in self._stale(there)]
        if not added and not removed:
            return self._unchanged()
        size = sum(operation.upload_info.size for operation in added)
        self._say(f"{len(added)} of {len(self.files)} files to upload to {push.repo_id}, {_bytes(size)}")
        if push.create_pr and self.pull_request is None:
            # Large files first: an upload that fails leaves no empty pull request.
            api.preupload_lfs_files(push.repo_id, added, create_pr=True, free_memory=False)
            self._open_pull_request()
        commit = api.create_commit(
            push.repo_id,
            [*removed, *added],
            commit_message=push.commit_message,
            commit_description=push.commit_description,
            revision=self.revision,
        )
        return self.pull_request or str(commit.commit_url)

    def _unchanged(self) -> str:
        self._say(f"{self.push.repo_id} holds all of it already")
        commit = self.api.model_info(self.push.repo_id, revision=self.revision).sha
        return self.pull_request or f"{self.api.endpoint}/{self.push.repo_id}/commit/{commit}"

    def _there(self) -> dict[str, str]:
        """sha256 of each large file of the repository, git's hash of each other one."""
        from huggingface_hub.hf_api import RepoFile

        entries = self.api.list_repo_tree(self.push.repo_id, recursive=True, revision=self.revision)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    def _additions(self, there: Mapping[str, str]) -> list[Any]:
        from huggingface_hub import CommitOperationAdd

        added = []
        for name, path in self.files.items():
            content: Path | bytes = path
            if name == CARD:
                if CARD in there and not self.push.replace_card:
                    self._say(f"{CARD} of {self.push.repo_id} stays as it is; replace_model_card=True replaces it")
                    continue
                content = _named(path, self.push.repo_id)
            if there.get(name) not in _hashes(content):
                added.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
        return added

    def _stale(self, there: Mapping[str, str]) -> list[str]:
        """Files of an earlier model that a reader would pick up beside this one, as a save to a folder removes them."""
        if not any(name in self.files for name in MARKERS):
            return []
        old = [name for name in there if name not in self.files and _of_a_model(name)]
        if old:
            self._say(
                f"removed from {self.push.repo_id} in the same commit, being an earlier model's: {', '.join(old)}"
            )
        return old

    def _open_pull_request(self) -> None:
        push, api = self.push, self.api

        def create() -> Any:
            return api.create_pull_request(push.repo_id, title=push.commit_message, description=push.commit_description)

        made = persist("opening a pull request", create, repeatable=False)
        self.revision, self.pull_request = made.git_reference, str(made.url)

    def _say(self, line: str) -> None:
        """Tell the user something once, however many attempts there are."""
        if line not in self.told:
            self.told.add(line)
            print(f"burnish: {line}", file=sys.stderr, flush=True)


def _of_a_model(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in (*STALE, *MARKERS))


def _named(card: Path, repo_id: str) -> bytes:
    """The card with the repository's name where it said none."""
    text = card.read_text(encoding="utf-8")
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, repo_id)
    return text.encode("utf-8")


def _hashes(content: Path | bytes) -> tuple[str, str]:
    """A file's sha256, by which the Hub knows large files, and git's hash of it as a blob, for all others."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    large, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    for block in [content] if isinstance(content, bytes) else _blocks(content):
        large.update(block)
        git.update(block)
    return large.hexdigest(), git.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(2**20):
            yield block


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
