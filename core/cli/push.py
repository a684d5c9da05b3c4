"""`burnish push`: a folder that was saved before, to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MESSAGE = "Add model"


def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a saved model: an adapter, a full one, an export.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME, or NAME for one of your own.")],
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, made if need be, or refs/pr/N. Left out, main.", show_default=False),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository; another has to be so.", show_default=False),
    ] = None,
    message: Annotated[str, typer.Option(help="Title of the commit, and of the pull request.")] = _MESSAGE,
    description: Annotated[str | None, typer.Option(help="Text below the title.", show_default=False)] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open one; main stays as it is.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Stop if the repository is there already.")] = False,
    replace_card: Annotated[
        bool, typer.Option("--replace-card", help="Put this README.md in place of one that is there.")
    ] = False,
) -> None:
    """Upload a saved folder in one commit, with the token that `hf auth login` left or HF_TOKEN holds.

    What is there already is not sent again, so a push that failed goes on where it stopped. Prints the address of the
    commit or the pull request.
    """
    from ..hub import upload
    from ..hub_upload import Push

    asked = Push(
        repo_id=repo_id,
        revision=revision,
        private=private,
        commit_message=message,
        commit_description=description,
        create_pr=pull_request,
        exist_ok=not new,
        replace_card=replace_card,
    )
    print(upload(folder, asked))
