"""Fetch a model from the Hugging Face Hub into the cache that all Hugging Face libraries share.

huggingface_hub does all of it but the large files: since version 1 it starts those again from nothing after a
kill. So they are fetched here, appended to what is there, and checked against their SHA-256. The cache's
layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm

from pdengine.models.checkpoint import INDEX_FILE, SINGLE_FILE, CheckpointError, read_json

# Exactly what is read: a repository may also have pickles, other frameworks' weights, or the weights twice.
TEXT_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    INDEX_FILE,
]
MAX_CONNECTIONS = 8


class _NoBar(tqdm):
    """The library draws three bars for a few small files, in log files too; the large ones have their own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]


def download_model(model_id: str, revision: str | None) -> Path:
    """Fetch what is missing of `model_id`; returns its directory in the cache. Raises CheckpointError."""
    with _errors_as_one_sentence(model_id, revision):
        snapshot = Path(
            snapshot_download(model_id, revision=revision, allow_patterns=TEXT_FILES, tqdm_class=_NoBar)
        )
        missing = [name for name in _weight_names(snapshot) if not (snapshot / name).exists()]
        if missing:
            commit = snapshot.name
            _download_large_files(model_id, commit, missing)
            # Links them into the snapshot; fetches those that are too small or too large for us.
            snapshot_download(model_id, revision=commit, allow_patterns=missing, tqdm_class=_NoBar)
    return snapshot


def _weight_names(snapshot: Path) -> list[str]:
    if not (snapshot / INDEX_FILE).exists():
        return [SINGLE_FILE]
    index = read_json(snapshot / INDEX_FILE)
    weight_map = index.nested("weight_map")
    if weight_map is None:
        raise index.error("weight_map", "must be an object of tensor names and file names")
    return sorted({name for name in weight_map.values.values() if isinstance(name, str)})


def _download_large_files(model_id: str, commit: str, names: Sequence[str]) -> None:
    """Fetch those of `names` that the Hub keeps as large files (LFS) into the cache's blobs."""
    entries = HfApi().get_paths_info(model_id, list(names), revision=commit)
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    absent = sorted(set(names) - {file.path for file in files})
    if absent:
        raise CheckpointError(
            f"{model_id}: the model has no {absent[0]} (only safetensors weights are supported)"
        )
    large = [f for f in files if f.lfs is not None and f.size <= constants.MAX_HTTP_DOWNLOAD_SIZE]
    _check_space(model_id, large)
    _in_threads(lambda file: _download_large_file(model_id, commit, file), large)


def _download_large_file(model_id: str, commit: str, file: RepoFile) -> None:
    """Fetch one file into its blob. A part of it that is there already is kept, and not fetched again."""
    blob, partial = _blob_paths(model_id, file)
    # The library's own lock, so that no other process fetches the same file.
    lock = Path(constants.HF_HUB_CACHE, ".locks", blob.parent.parent.name, f"{blob.name}.lock")
    for parent in (lock.parent, blob.parent):
        parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(model_id, file.path, revision=commit)
    with WeakFileLock(lock):
        while not blob.exists():
            with partial.open("ab") as output:
                already = output.tell()
                if already <= file.size:
                    http_get(
                        url,
                        output,
                        resume_size=already,
                        headers=build_hf_headers(library_name="pdengine"),
                        expected_size=file.size,
                        displayed_filename=file.path,
                    )
            if _sha256(partial) == blob.name:
                partial.replace(blob)
                return
            partial.unlink()  # after a resumption, the older part may be what is wrong
            if already == 0:
                raise CheckpointError(f"{model_id}: {file.path} arrived damaged (wrong SHA-256), try again")


def _blob_paths(model_id: str, file: RepoFile) -> tuple[Path, Path]:
    """Where the whole file goes, named by its SHA-256, and where its first part grows."""
    assert file.lfs is not None
    folder = repo_folder_name(repo_id=model_id, repo_type="model")
    blob = Path(constants.HF_HUB_CACHE, folder, "blobs", file.lfs.sha256)
    return blob, blob.with_name(f"{blob.name}.incomplete")


def _check_space(model_id: str, files: Sequence[RepoFile]) -> None:
    """Raise CheckpointError now rather than when the disk is full, hours later."""
    missing = 0
    for file in files:
        blob, partial = _blob_paths(model_id, file)
        if not blob.exists():
            missing += max(0, file.size - (partial.stat().st_size if partial.exists() else 0))
    free = shutil.disk_usage(constants.HF_HUB_CACHE).free
    if missing > free:
        raise CheckpointError(
            f"{model_id}: {missing / 1e6:.1f} MB are left to fetch, "
            f"but {constants.HF_HUB_CACHE} has only {free / 1e6:.1f} MB free"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_threads(function: Callable[[RepoFile], None], files: Sequence[RepoFile]) -> None:
    """Call `function` with each file, several at once; the first error is raised, and no further one begun.

    The threads are daemons: a pool would let neither Ctrl-C nor an error through before its files are there.
    """
    waiting: SimpleQueue[RepoFile] = SimpleQueue()
    finished: SimpleQueue[BaseException | None] = SimpleQueue()

    def work() -> None:
        while True:
            try:
                file = waiting.get_nowait()
            except Empty:
                return
            try:
                function(file)
            except BaseException as error:
                finished.put(error)
                return
            finished.put(None)

    for file in files:
        waiting.put(file)
    for _ in files[:MAX_CONNECTIONS]:
        Thread(target=work, daemon=True).start()
    for _ in files:
        error = finished.get()
        if error is not None:
            while not waiting.empty():
                waiting.get()
            raise error


@contextmanager
def _errors_as_one_sentence(model_id: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP library differs between versions, and so do its types
        raise CheckpointError(f"{model_id}: {_sentence(error, model_id, revision)}") from error


def _sentence(error: BaseException, model_id: str, revision: str | None) -> str:
    hub = constants.ENDPOINT
    log_in = "set HF_TOKEN or run `hf auth login`"
    match error:
        case HFValidationError():
            return "no such directory, and no id of a model such as Qwen/Qwen3-0.6B"
        case GatedRepoError():
            return f"access is restricted, ask for it at {hub}/{model_id} and {log_in}"
        case RepositoryNotFoundError():
            return f"no such directory, and no such model at {hub} (if it is private, {log_in})"
        case RevisionNotFoundError():
            return f"the model has no revision {revision!r}"
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{hub} refuses the token ({_first_line(error)}), {log_in}"
        case OfflineModeIsEnabled():
            return f"not all of it is in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it"
        case LocalEntryNotFoundError() if error.__cause__ is not None:
            return _sentence(error.__cause__, model_id, revision)
        case OSError(strerror=str(reason), filename=path) if path is not None or error.errno:
            return f"cannot be written to {constants.HF_HUB_CACHE} ({reason})"
        case _:
            return f"cannot be fetched from {hub} ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
