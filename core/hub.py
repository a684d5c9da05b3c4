"""Pushes to the Hugging Face Hub: a whole folder is written first, and then arrives in one commit or not at all."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from .errors import BurnishError, ConfigError
from .hub_errors import HubError, cause, expected, meaning, remedy
from .hub_upload import Push, Upload, checked, files_of
from .layout import check_layout
from .settings import user_folder


def push_folder(make: Callable[[Path], None], repo_id: str, **options: Any) -> str:
    """Have a folder made, and upload it. Where the upload fails, the folder stays and the error names it.

    Args:
        make: Writes everything into the folder that it is given, which is not there yet.
        repo_id: Where to.
        **options: Of `Push`.

    Returns:
        The commit's address, a pull request's with `create_pr`.

    Raises:
        ConfigError: If what is asked for cannot be.
        BurnishError: If the folder cannot be written; nothing is left of it then.
        HubError: If it could not be uploaded.
    """
    push = checked(Push(repo_id=repo_id, **options))
    place = _new_place(push.repo_id)
    folder = place / push.repo_id.rpartition("/")[2]
    try:
        make(folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return upload(folder, push)


def unfinished() -> Path:
    """Where folders lie while they are pushed, and stay if that fails: `push` in `BURNISH_CACHE` or your cache."""
    return user_folder("pushes", "BURNISH_CACHE", "XDG_CACHE_HOME", ".cache") / "push"


def _new_place(repo_id: str) -> Path:
    root = unfinished()
    try:
        root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=repo_id.replace("/", "--") + "-", dir=root))
    except OSError as error:
        fix = "Set BURNISH_CACHE to a folder that you may write to, with some space"
        raise BurnishError(f"cannot be written ({error.strerror})", where=str(root), fix=fix) from error


def upload(folder: Path, push: Push) -> str:
    """Upload a folder that is there. Returns and raises as `push_folder`.

    What the repository has already is not sent again: neither files that are the same there, nor the large ones whose
    content an upload before left on the Hub. Files of an earlier model that would be read beside this one are removed
    in the same commit. A folder that `push_folder` left is removed once it has arrived.
    """
    folder = folder.resolve()
    push = checked(push)
    work = Upload(push, files_of(folder))
    with _told(folder, push, work):
        url = work.run()
    if folder.parent.parent == unfinished().resolve():
        shutil.rmtree(folder.parent, ignore_errors=True)
    return url


def command(folder: Path, push: Push) -> str:
    """The command that uploads a folder as `push` says; the token is not in it."""
    words = ["burnish", "push", str(folder), push.repo_id]
    message = (
        push.commit_message if push.commit_message != Push.__dataclass_fields__["commit_message"].default else None
    )
    given = {"--revision": push.revision, "--message": message, "--description": push.commit_description}
    words += [word for name, value in given.items() if value for word in (name, value)]
    flags = {"--private": push.private, "--public": push.private is False, "--pull-request": push.create_pr,
             "--new": not push.exist_ok, "--replace-card": push.replace_card}  # fmt: skip
    return shlex.join(words + [name for name, given in flags.items() if given])


@contextmanager
def _told(folder: Path, push: Push, upload: Upload) -> Iterator[None]:
    """Whatever ends an upload is told with where the folder is and how to go on."""

    def whole() -> str:
        # What goes on finds the repository that this push has made, and a pull request that it has opened.
        again = replace(push, exist_ok=push.exist_ok or upload.made)
        if upload.pull_request is not None:
            again = replace(again, revision=upload.revision, create_pr=False)
        return f"The folder is whole: {folder}. To go on: {command(folder, again)}"

    try:
        yield
    except BurnishError as error:
        raise type(error)(error.what, where=error.where, fix=f"{error.fix}. {whole()}") from error
    except Exception as error:
        if not expected(error):
            error.add_note(whole())
            raise
        root = cause(error)
        raise HubError(meaning(root), where=f"push to {push.repo_id}", fix=f"{remedy(root)}. {whole()}") from error
    except BaseException:
        print(f"burnish: {whole()}", file=sys.stderr, flush=True)
        raise


def push_model(model: Any, save: Callable[[Path], None], repo_id: str, **options: Any) -> str:
    """Push what `save` writes of a model, its card with the repository's name. Returns and raises as `push_folder`.

    Args:
        model: A model of Sentence Transformers; its card's data gets the name.
        save: Writes the model into a folder.
        repo_id: Where to.
        **options: Of `Push`; without a message the commit says what was added.
    """
    options["commit_message"] = options.get("commit_message") or f"Add new {type(model).__name__} model"
    push = checked(Push(repo_id=repo_id, **options))
    if push.create_pr and push.commit_description is None:
        push = replace(push, commit_description=f"Adds this model:\n```\n{model}\n```")
    model.model_card_data.set_model_id(push.repo_id)
    return push_folder(save, **{name: getattr(push, name) for name in Push.__dataclass_fields__})


def push_as_stock(model: Any, repo_id: str, *arguments: Any, layout: str, **keywords: Any) -> str:
    """`push_to_hub` with the parameters that Sentence Transformers gives it. Returns and raises as `push_folder`.

    Raises:
        ConfigError: Also if the repository is the adapter's base model, which the adapter would take the place of.
    """
    from sentence_transformers.base.model import BaseModel

    from .adapters import adapter_base

    bound = signature(BaseModel.push_to_hub).bind(model, repo_id, *arguments, **keywords)
    bound.apply_defaults()
    given = bound.arguments
    check_layout(layout)
    base = adapter_base(model.transformers_model)
    if base is not None and base.casefold() == repo_id.casefold():
        fix = "Push to another repository, or push_to_hub_merged"
        raise ConfigError("the adapter needs the base model in this repository", where=repo_id, fix=fix)
    names = ("token", "private", "commit_message", "exist_ok", "revision", "create_pr")
    options = {name: given[name] for name in names} | {"replace_card": given["replace_model_card"]}
    if (local := given["local_model_path"]) is not None:
        options["commit_message"] = options["commit_message"] or f"Add new {type(model).__name__} model"
        return upload(Path(local), Push(repo_id=repo_id, **options))

    def save(folder: Path) -> None:
        model.save(folder, repo_id, True, given["train_datasets"], given["safe_serialization"], layout)

    return push_model(model, save, repo_id, **options)
