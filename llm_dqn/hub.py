"""Uploading what a run made. The only file that talks to the Hugging Face Hub in order to write."""

from pathlib import Path

from huggingface_hub import HfApi

# Replay and optimizer states never leave the machine: prompts may be private.
ALLOWED = ["README.md", "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def upload(folder: Path, repo_id: str, private: bool = True) -> str:
    """Creates the repository when needed and uploads the model files of `folder`; returns the address of the commit.

    The token is huggingface_hub's own (`HF_TOKEN` or a login); errors of the Hub come through as they are.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=ALLOWED)
    return str(commit.commit_url)
