"""Uploading what a run made. The only file that talks to the Hugging Face Hub in order to write.

One commit holds everything, so nobody ever sees half an upload. What is large is sent before it, file by file, and what
the Hub has already is not sent again, so a push that broke off is repeated with the same command.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from llm_dqn.bundle import Bundle, bundle, holds_other_weights
from llm_dqn.errors import RunError, UserError

T = TypeVar("T")

WAITS = (1.0, 4.0, 15.0)  # seconds before each new try, on top of what huggingface_hub tries by itself
LONGEST_WAIT = 300.0  # a Hub that asks for more is given up
PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}  # answers that may be others a moment later
LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


class HubError(RunError):
    """The Hub did not take the upload. `status` is its answer, None where there was none."""

    heading = "the upload failed"

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def push(
    run: str,
    repo_id: str,
    *,
    public: bool = False,
    base_model: str | None = None,
    branch: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Uploads a run's adapter, or the model in that folder, with card, recipe and figures; returns the address.

    The repository is made when it is missing, private unless `public`. base_model: Hub id of a base that was trained
    from a folder. branch: made when it is missing; the main one by default. dry_run: only says what would be sent, and
    opens no connection. The token is huggingface_hub's own. Raises UserError for what cannot be shared, HubError when
    the Hub would not have it; the run folder is never changed.
    """
    prepared = bundle(run, repo_id, base_model)
    if dry_run:
        _describe(prepared, repo_id, public, say)
        say("nothing was sent: this was a dry run")
        return ""
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    if get_token() is None:
        raise UserError(f"no access token for the Hugging Face Hub: {LOGIN}")
    api = HfApi()
    again = f"nothing is lost: {run} is as it was, and the same command goes on where this one stopped"
    if base_model is not None:
        with _explained(base_model, again):
            found = _persistently(lambda: api.model_info(base_model, files_metadata=True), say)
        hashes = {file.rfilename: file.lfs.sha256 for file in found.siblings or () if file.lfs is not None}
        prepared = bundle(run, repo_id, base_model, found.sha)
        if holds_other_weights(prepared.local_base, hashes):
            say(f"note: the weights of {base_model} are not those that the run started from; results may differ")
    with _explained(repo_id, again):
        _describe(prepared, repo_id, public, say)
        _persistently(lambda: _ready(api, repo_id, public, branch, prepared), say)
        url = _persistently(lambda: _commit(api, repo_id, branch, prepared), say)
    say(f"uploaded: {url}")
    return url


@contextmanager
def _explained(repo_id: str, again: str) -> Iterator[None]:
    """Turns what the Hub and the network raise into one sentence for people."""
    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise HubError(f"{explain(error, repo_id)}; {again}", _status(error)) from error


def _describe(prepared: Bundle, repo_id: str, public: bool, say: Callable[[str], None]) -> None:
    total = sum(upload.size for upload in prepared.files)
    say(f"{'public' if public else 'private'} repository {repo_id}, {len(prepared.files)} files, {_bytes(total)}:")
    for upload in prepared.files:
        say(f"  {upload.name:<28} {_bytes(upload.size):>10}")
    for note in prepared.notes:
        say(f"note: {note}")


def _ready(api: HfApi, repo_id: str, public: bool, branch: str | None, prepared: Bundle) -> None:
    """Makes repository and branch where they are missing; refuses to write where that would surprise."""
    api.create_repo(repo_id, private=not public, exist_ok=True)
    info = api.model_info(repo_id)
    if not public and info.private is False:
        raise UserError(f"{repo_id} exists and everybody can read it; add --public if that is meant")
    there = {file.rfilename for file in info.siblings or ()}
    other = "adapter_config.json" if prepared.kind != "adapter" else "config.json"
    if other in there and branch is None:
        has, new = ("an adapter", "a whole model") if prepared.kind != "adapter" else ("a whole model", "an adapter")
        raise UserError(f"{repo_id} holds {has}, and {new} beside it would open wrongly; choose another repository")
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)


def _commit(api: HfApi, repo_id: str, branch: str | None, prepared: Bundle) -> str:
    """Sends what the Hub does not have yet, in one commit; none where it has everything."""
    operations = [
        CommitOperationAdd(upload.name, upload.content if isinstance(upload.content, bytes) else str(upload.content))
        for upload in prepared.files
    ]
    commit = api.create_commit(
        repo_id, operations, commit_message=f"Upload {prepared.kind} with llm-dqn", revision=branch
    )
    return str(commit.commit_url)


# --- when it does not work --------------------------------------------------------------------------------------------


def _persistently(action: Callable[[], T], say: Callable[[str], None]) -> T:
    """Tries again, and what is done already stays done, while the trouble is of a kind that passes."""
    for wait in (*WAITS, None):
        try:
            return action()
        except (HTTPError, OSError, RuntimeError) as error:
            cause = _cause(error)
            asked = _retry_after(cause)
            status = _status(cause)
            passing = isinstance(cause, HTTPError) and (status is None or status in PASSING)
            if wait is None or not passing or asked > LONGEST_WAIT:
                raise
            what = "the connection broke" if status is None else f"the Hub answered {status}"
            pause = max(wait, asked)
            say(f"{what}; trying again in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def explain(error: BaseException, repo_id: str) -> str:
    """What went wrong and what to do about it, in one sentence without address or token."""
    cause = _cause(error)
    status = _status(cause)
    owner = repo_id.split("/")[0]
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it"
    if isinstance(cause, GatedRepoError):
        return "a repository is gated; ask for access on its page at the Hub, with the account of your token"
    if isinstance(cause, HfHubHTTPError) and status is not None:
        sentences = {
            400: f"the Hub refused the upload ({_said(cause)})",
            401: f"the Hub does not accept the access token; {LOGIN}",
            402: f"the Hub asks for payment before '{owner}' may store this ({_said(cause)})",
            403: f"the access token may not write to '{owner}'; {LOGIN} there, or choose a repository of your own",
            404: f"{repo_id} or a branch of it is not on the Hub, or not visible to the account of your token",
            409: f"somebody else is writing to {repo_id} at the same time; wait a moment",
            413: f"a file is larger than the Hub takes ({_said(cause)})",
            422: f"the Hub says that a file arrived damaged ({_said(cause)})",
            429: "the Hub has too many requests of this account; wait some minutes",
        }
        later = f"the Hub has trouble of its own (error {status}); try again later"
        return sentences.get(status, later if status >= 500 else f"the Hub answered {status} ({_said(cause)})")
    if isinstance(cause, HTTPError):
        return f"the connection to {constants.ENDPOINT} broke ({type(cause).__name__})"
    return " ".join(str(cause).split()) or type(cause).__name__


def _cause(error: BaseException) -> BaseException:
    """huggingface_hub wraps what happened in a thread that uploads."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    response = getattr(_cause(error), "response", None)
    return getattr(response, "status_code", None)


def _retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks to wait; 0 where it does not."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = str(headers.get("Retry-After", ""))
    return float(value) if value.isdigit() else 0.0


def _said(error: HfHubHTTPError) -> str:
    return error.server_message or _first_line(error)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.1f} GB"
