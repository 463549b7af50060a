"""From the name of a model, as users write it, to the directory of its checkpoint."""

from pathlib import Path

from pdengine.models.checkpoint import CheckpointError


def resolve_model(name: str, *, revision: str | None = None) -> Path:
    """The checkpoint directory of `name`: a directory, or the id of a model on the Hugging Face Hub.

    A model by id, such as "Qwen/Qwen3-0.6B", is fetched into the cache that all Hugging Face libraries share,
    or found there. `revision` is a branch, a tag or a commit, by default the branch "main". What was fetched
    before a kill is not fetched again. The usual environment variables hold: HF_HOME, HF_TOKEN, HF_ENDPOINT,
    HF_HUB_OFFLINE. Progress is drawn where standard error is a terminal.

    Raises CheckpointError, with one sentence, when there is no such model or it cannot be fetched.
    """
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        if revision is not None:
            raise CheckpointError(f"{name}: a directory has no revisions, found revision {revision!r}")
        return directory
    if name and directory.exists():
        raise CheckpointError(f"{name}: not a directory")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: no such directory")
    # Takes a quarter of a second to import, and only models by id need it.
    from pdengine.models.hub_download import download_model

    return download_model(name, revision)
