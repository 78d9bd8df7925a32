"""Fetches models by their names from the Hugging Face hub, or one that speaks its API.

`huggingface_hub` does the work, with its cache, progress bars and settings: `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` or the
token that `hf auth login` stored, `HF_HUB_OFFLINE`. Only the files that a checkpoint reads are fetched.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsex_jax.checkpoints.gguf_file import group_models
from sparsex_jax.checkpoints.huggingface import READ_FILES, weight_files
from sparsex_jax.checkpoints.names import HubName
from sparsex_jax.errors import HubError, UnknownModelError
from sparsex_jax.text.tokenizer import OTHER_TOKENIZERS
from sparsex_jax.text.tokenizer import READ_FILES as TOKENIZER_FILES

log = logging.getLogger(__name__)

_TEMPLATES = "additional_chat_templates/"
_CONVERTED = ("params/", "tokenizer/")  # folders of a checkpoint in this package's own format
_BESIDE_MODELS = re.compile(r"(^|/)(mmproj|imatrix)", re.IGNORECASE)  # GGUF files that are no language models
# The last of these in a file's name says how it is quantised.
_QUANTISATION = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|BF16|FP?16|FP?32)(?![A-Za-z0-9])", re.IGNORECASE
)


def fetch(name: HubName) -> Path:
    """The directory or the GGUF file of a model, fetched as far as it is not in the cache.

    Raises:
      UnknownModelError: there is no such repository, revision or quantisation, or it holds no model.
      HubError: the hub cannot be reached and not all is in the cache, or it refuses access.
    """
    with _clear_errors(name):
        repository = _Repository(name)
        files = repository.files
        if name.quantisation is None and "config.json" in files:
            return _fetch_directory(repository, files)
        parts = _of_quantisation(name, files)
        return repository.fetch(parts) / parts[0]


def fetch_files(name: HubName, wanted: Sequence[str]) -> Path:
    """A directory with these files of a repository, which must have all of them. Errors as `fetch`."""
    if name.quantisation is not None:
        raise UnknownModelError(f"{name}: files are wanted of {name.repo}, and not a model of a quantisation")
    with _clear_errors(name):
        repository = _Repository(name)
        missing = [file for file in wanted if file not in repository.files]
        if missing:
            raise UnknownModelError(f"{name}: {name.repo} has no {', '.join(missing)}")
        return repository.fetch(wanted)


def _fetch_directory(repository: _Repository, files: Sequence[str]) -> Path:
    small = {*READ_FILES, *TOKENIZER_FILES} - set(OTHER_TOKENIZERS if "tokenizer.json" in files else ())
    folder = repository.fetch([file for file in files if file in small or file.startswith((_TEMPLATES, *_CONVERTED))])
    if not any(file.startswith(_CONVERTED) for file in files):
        repository.fetch(weight_files(folder, [file for file in files if "/" not in file]))
    return folder


class _Repository:
    """A repository at one commit.

    Attributes:
      files: all that it has; offline, what is known of it.
    """

    def __init__(self, name: HubName) -> None:
        from huggingface_hub import HfApi, constants

        self._is_offline = constants.is_offline_mode()
        self._repo, self._api = name.repo, HfApi(library_name="sparsex-jax")
        self._revision = self._api.resolve_revision(name.repo, revision=name.revision)
        log.info("%s: commit %s, from %s or its cache", name, self._revision.resolved, self._api.endpoint)
        self.files = self._list()

    def _list(self) -> list[str]:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            return [file.path for file in get_cached_repo_tree(self._repo, revision=self._revision)]
        except CachedRepoTreeNotFoundError:
            pass
        if self._is_offline:  # what is in the cache came there by another way
            folder = Path(self._api.snapshot_download(self._repo, revision=self._revision, local_files_only=True))
            return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        return self._api.list_repo_files(self._repo, revision=self._revision.resolved)

    def fetch(self, files: Sequence[str]) -> Path:
        """The directory that then has these files, where they are in the repository."""
        patterns = [glob.escape(file) for file in files]
        bars = {} if sys.stderr.isatty() else {"tqdm_class": _no_bar()}
        folder = self._api.snapshot_download(self._repo, revision=self._revision, allow_patterns=patterns, **bars)
        return Path(folder)


def _no_bar() -> Any:
    """A progress bar that shows nothing, for a standard error that is no terminal."""
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})

    return NoBar


def _of_quantisation(name: HubName, files: Sequence[str]) -> list[str]:
    """The file of the GGUF model that is meant, or its parts.

    Raises:
      UnknownModelError: there is none, or several; the message lists the quantisations there are.
    """
    paths = [file for file in files if file.lower().endswith(".gguf") and not _BESIDE_MODELS.search(file)]
    models = group_models(paths)
    if not models:
        what = "no config.json and no GGUF file" if name.quantisation is None else "no GGUF file"
        raise UnknownModelError(f"{name}: {name.repo} has {what}")
    wanted = None if name.quantisation is None else name.quantisation.lower()
    fitting = [
        parts for model, parts in models.items() if wanted in (None, _quantisation(model), Path(model).stem.lower())
    ]
    if len(fitting) == 1:
        return fitting[0]
    there_are = ", ".join(sorted({_quantisation(model) for model in models}))
    if wanted is None or fitting:
        raise UnknownModelError(f"{name}: {name.repo} has several GGUF models; name one as {name.repo}:{there_are}")
    raise UnknownModelError(f"{name}: {name.repo} has no GGUF model of that quantisation; it has: {there_are}")


def _quantisation(model: str) -> str:
    """How the model is quantised by its file's name, in lower case; the whole name if it does not say."""
    stem = Path(model).stem
    found = _QUANTISATION.findall(stem)
    return (found[-1] if found else stem).lower()


@contextlib.contextmanager
def _clear_errors(name: HubName) -> Iterator[None]:
    """Turn the libraries' errors into one of this package, which says what can be done."""
    import huggingface_hub.errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise HubError(
            f"{name}: access to {name.repo} is restricted. Ask for it on the model's page, and then set HF_TOKEN or "
            "run `hf auth login`"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise UnknownModelError(f"{name}: {name.repo} has no revision {name.revision!r}") from error
    except hub.RepositoryNotFoundError as error:
        raise UnknownModelError(
            f"{name}: there is no such file or directory here, and no such model on {_endpoint()}. If it is a private "
            "one, set HF_TOKEN or run `hf auth login`"
        ) from error
    except hub.HFValidationError as error:
        raise UnknownModelError(f"{name}: {_first_line(error)}") from error
    except (hub.RevisionResolutionError, hub.LocalEntryNotFoundError) as error:
        raise HubError(f"{name}: {_unreachable()}, and the model is not in the cache, or not whole") from error
    except hub.HfHubHTTPError as error:
        raise HubError(f"{name}: {_refused(error)}") from error
    except hub.HTTPError as error:
        raise HubError(f"{name}: {_unreachable()}: {_first_line(error)}") from error
    except OSError as error:
        raise HubError(f"{name} cannot be fetched: {_first_line(error)}") from error


def _refused(error: Any) -> str:
    """What an answer of the hub says that is no success."""
    status = error.response.status_code
    if status in (401, 403):
        return f"{_endpoint()} refuses access ({status}); set HF_TOKEN or run `hf auth login`"
    return f"{_endpoint()} answered {status}: {_first_line(error)}"


def _unreachable() -> str:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return f"{_endpoint()} cannot be reached"


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
