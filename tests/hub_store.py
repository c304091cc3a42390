"""A stand-in for the Hugging Face Hub: repositories are folders, nothing leaves the machine.

`HubStore(root, monkeypatch)` replaces huggingface_hub's functions wherever an imported module holds them.
Each call is kept in `calls` as (function, repository, arguments), so that a test can see which token and
revision were passed.
"""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

REPLACED = (
    "create_repo",
    "upload_folder",
    "snapshot_download",
    "hf_hub_download",
    "model_info",
    "_resolve_revision",
)


class HubStore:
    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root = Path(root)
        self.calls: list[tuple[str, str, dict]] = []
        import diffusers.utils.hub_utils

        for name in REPLACED:
            original = getattr(huggingface_hub, name, None) or getattr(diffusers.utils.hub_utils, name)
            for module in list(sys.modules.values()):
                if vars(module).get(name) is original:
                    monkeypatch.setattr(module, name, getattr(self, name))
        monkeypatch.setattr(huggingface_hub.ModelCard, "load", self._load_card)

    def repo(self, repo_id: str) -> Path:
        return self.root / "repos" / repo_id

    def files(self, repo_id: str) -> list[str]:
        folder = self.repo(repo_id)
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())

    def fetched(self, repo_id: str) -> list[str]:
        """What has been downloaded of a repository so far."""
        folder = self._cache(repo_id)
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())

    def create_repo(self, repo_id: str, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs))
        self.repo(repo_id).mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs):
        self.calls.append(("upload_folder", repo_id, kwargs))
        shutil.copytree(folder_path, self.repo(repo_id), dirs_exist_ok=True)
        return types.SimpleNamespace(oid="0" * 40)

    def snapshot_download(self, repo_id: str, allow_patterns=None, ignore_patterns=None, **kwargs) -> str:
        self.calls.append(("snapshot_download", repo_id, kwargs))
        wanted = filter_repo_objects(
            self.files(repo_id), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in wanted:
            self._fetch(repo_id, file)
        return str(self._cache(repo_id))

    def hf_hub_download(self, repo_id: str, filename: str, subfolder: str | None = None, **kwargs) -> str:
        self.calls.append(("hf_hub_download", repo_id, kwargs))
        return str(self._fetch(repo_id, f"{subfolder}/{filename}" if subfolder else filename))

    def model_info(self, repo_id: str, **kwargs):
        siblings = [types.SimpleNamespace(rfilename=file) for file in self.files(repo_id)]
        return types.SimpleNamespace(siblings=siblings, sha="0" * 40)

    def _resolve_revision(self, repo_id: str, *, revision: str | None = None, **kwargs) -> str | None:
        return revision

    def _cache(self, repo_id: str) -> Path:
        folder = self.root / "cache" / repo_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _fetch(self, repo_id: str, file: str) -> Path:
        source, target = self.repo(repo_id) / file, self._cache(repo_id) / file
        if not source.is_file():
            raise EntryNotFoundError(f"{repo_id} has no {file}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return target

    def _load_card(self, repo_id: str, **kwargs):
        raise EntryNotFoundError(f"{repo_id} has no README.md")
