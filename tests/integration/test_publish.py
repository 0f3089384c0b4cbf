"""What must not leave this machine is found, and the rest gets to the Hub whole, once, and without the token."""

import hashlib
import json
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_mock import serve
from huggingface_hub import constants
from publish_folder import TOKEN
from safetensors.torch import save_file

from hybridlm import presets
from hybridlm.evaluation.loading import file_hash
from hybridlm.hub import publish as publishing
from hybridlm.hub.golden import GOLDEN
from hybridlm.hub.publish import check_publishable, upload, uploads
from hybridlm.hub.safety import pickle_reason, secrets, too_large, unsafe_files


class Loaded:
    def __reduce__(self):
        return (print, ("loaded",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_known_by_its_content(tmp_path, protocol):
    for number, value in enumerate((Loaded(), {"a": [1, 2]}, [Loaded()] * 3)):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(pickle.dumps(value, protocol))
        assert pickle_reason(path) == "a pickle by its content", value


def test_archives_and_arrays_of_objects_are_pickles_and_plain_arrays_are_none(tmp_path):
    path = tmp_path / "a.json"
    torch.save({"a": torch.ones(2)}, path)
    assert pickle_reason(path) == "a PyTorch archive with a pickle"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert pickle_reason(path) == "a pickle by its content"
    for array, expected in ((np.array([{}, None]), "a NumPy array of objects, which is a pickle"), (np.ones(3), "")):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        assert pickle_reason(tmp_path / "a.npy") == expected
    shutil.make_archive(str(tmp_path / "b"), "gztar", tmp_path, "a.npy")
    assert "archive" in pickle_reason(tmp_path / "b.tar.gz")


def test_no_text_of_this_repository_is_taken_for_a_pickle():
    root = presets.data_path("configs").parent
    paths = [path for kind in ("hybridlm/**/*.py", "tests/**/*.py", "*.md", "configs/**/*") for path in root.glob(kind)]
    paths = [path for path in paths if path.is_file()]
    assert len(paths) > 100
    assert not [path for path in paths if path.suffix != ".pyc" and pickle_reason(path)]


SECRETS = {
    "a.py": f'token = "{TOKEN}"',
    "b.json": json.dumps({"key": "AKIA" + "A1" * 8}),
    "c.yaml": "aws_secret_access_key: " + "a1B2" * 10,
    "d.md": "-----BEGIN RSA PRIVATE " + "KEY-----",
    "e.json": '{"pem": "\\u002d----BEGIN PRIVATE ' + 'KEY-----"}',
    "f.json": json.dumps({"t": TOKEN}).replace("hf_", "\\u0068f_"),
    "g.txt": "ghp_" + "a1" * 20,
    "g1.jsonl": "{}\n" + json.dumps({"t": TOKEN}).replace("hf_", "\\u0068f_"),
    "g2.sh.txt": f"export TOKEN_{TOKEN}",
    "g3.txt": "hf_oauth_" + "eyJ" * 10,
    "g4.yaml": "WANDB_API_KEY: " + "a1" * 20,
    "g5.txt": "glpat-" + "a1" * 10,
}


def test_secrets_are_found_in_every_text_and_never_repeated(tmp_path):
    for name, text in SECRETS.items():
        (tmp_path / name).write_text(text)
    save_file({"a": torch.ones(1)}, tmp_path / "h.safetensors", metadata={"by": TOKEN})
    (tmp_path / "i.txt").write_text("my own one is plain-words")
    (tmp_path / "j.json").write_text(json.dumps({"vocab": ["hf_", "sk-", "AKIA", "aws secret"]}))
    found = list(secrets(tmp_path, ["plain-words"]))
    assert [problem.split(":")[0].split(",")[0] for problem in found] == [*SECRETS, "h.safetensors", "i.txt"]
    for text in (TOKEN, "plain-words", "AKIA" + "A1" * 8):
        assert text not in " ".join(found)


def test_what_a_download_leaves_behind_is_neither_uploaded_nor_in_the_way(folder):
    shown = uploads(folder)
    for place in (".cache/huggingface", ".cache/huggingface/download", ".git"):
        (folder / place).mkdir(parents=True)
        (folder / place / ".gitignore").write_text("*")
        (folder / place / "config.json.metadata").write_text("0\n0\n1.0\n")
    assert check_publishable(folder, run=False) == []
    assert uploads(folder) == shown
    (folder / ".cache" / "a.txt").write_text("a")
    assert ".cache/a.txt" in {file.path for file in uploads(folder)}


def test_links_out_of_the_folder_are_refused_and_links_inside_are_not(folder, tmp_path):
    (tmp_path / "outside.txt").write_text("outside")
    (folder / "inside.txt").symlink_to(folder / "results" / "run.yaml")
    (folder / "results" / "run.yaml").write_text("a: b\n")
    assert list(unsafe_files(folder)) == []
    (folder / "outside.txt").symlink_to(tmp_path / "outside.txt")
    assert list(unsafe_files(folder)) == ["outside.txt: a link out of the folder; copy the file instead"]


def test_sizes_beyond_the_limits_are_refused_with_the_sum(folder):
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    largest = (folder / "model.safetensors").stat().st_size
    assert list(too_large(folder, largest, total)) == []
    problems = list(too_large(folder, largest - 1, total - 1))
    assert problems[0] == f"model.safetensors: {largest:,} bytes, more than {largest - 1:,}; save smaller shards"
    assert f"{total:,} bytes in all" in problems[1]


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "me/my model", "me/-x"])
def test_what_is_no_repository_is_refused_before_anything_is_checked(cli, repo, tmp_path):
    said = cli("publish", tmp_path, "--repo", repo, "--dry-run")
    assert said.exit_code == 2
    assert "--repo" in said.output


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A Hub of this machine that huggingface_hub talks to, with a token."""
    with serve() as (hub, address):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, value in (("HF_HUB_OFFLINE", False), ("ENDPOINT", address), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        yield SimpleNamespace(hub=hub, address=address)


def contents(folder):
    return {file.path: (folder / file.path).read_bytes() for file in uploads(folder)}


def test_publishing_uploads_what_was_shown_and_the_token_appears_nowhere(folder, online, cli, caplog, capfd):
    caplog.set_level("DEBUG")
    said = cli("publish", folder, "--repo", "me/tiny", "--private")
    assert said.exit_code == 0, said.output
    assert online.hub.repos["me/tiny"] == {"private": True, "main": contents(folder)}
    assert f"uploaded: {online.address}/me/tiny/commit/" in said.output
    assert f"Bearer {TOKEN}" in online.hub.tokens
    printed = capfd.readouterr()
    for text in (said.output, caplog.text, printed.out, printed.err, *map(str, contents(folder).values())):
        assert TOKEN not in text


def test_an_upload_that_breaks_goes_on_where_it_was(folder, online):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    online.hub.broken.add(digest)
    with pytest.raises(OSError, match=r"(?s)me/tiny: .*403 Forbidden.*; the same command goes on where it was"):
        upload(folder, "me/tiny")
    golden = file_hash(folder / GOLDEN)
    assert online.hub.put == [golden]
    assert online.hub.repos["me/tiny"]["main"] == {}
    online.hub.broken.clear()
    upload(folder, "me/tiny")
    assert online.hub.put == [golden, digest]  # the one that had arrived was not sent again
    assert online.hub.repos["me/tiny"]["main"] == contents(folder)
    upload(folder, "me/tiny")
    assert online.hub.put == [golden, digest]


def test_a_revision_is_a_branch_of_its_own(folder, online):
    upload(folder, "me/tiny", revision="v2")
    assert online.hub.repos["me/tiny"]["main"] == {}
    assert online.hub.repos["me/tiny"]["v2"] == contents(folder)


def test_a_public_repository_is_not_taken_for_a_private_one(folder, online):
    online.hub.repos["me/tiny"] = {"private": False, "main": {}}
    with pytest.raises(ValueError, match="--private: me/tiny exists and is public"):
        upload(folder, "me/tiny", private=True)
    assert online.hub.put == []


def test_an_error_of_the_hub_never_holds_the_token(folder, online, caplog, capfd, cli, monkeypatch):
    monkeypatch.setattr(publishing, "check_publishable", lambda folder: [])
    caplog.set_level("INFO")
    online.hub.echo = True
    said = cli("publish", folder, "--repo", "me/tiny")
    assert said.exit_code == 2
    assert "bad credentials: Bearer hf_…" in said.output
    with pytest.raises(OSError, match="bad credentials") as error:
        upload(folder, "me/tiny")
    assert error.value.__context__ is None
    printed = capfd.readouterr()
    for text in (said.output, caplog.text, printed.out, printed.err, str(error.value)):
        assert TOKEN not in text


def test_without_a_network_or_a_token_nothing_is_asked_of_the_hub(folder, online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        upload(folder, "me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    with pytest.raises(ValueError, match="no token: `hf auth login`"):
        upload(folder, "me/tiny")
    assert online.hub.tokens == set()


def test_a_folder_that_holds_the_token_in_use_is_refused(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-shape")
    (folder / "notes.md").write_text("use a-token-of-another-shape\n")
    problems = check_publishable(folder, run=False)
    assert problems == ["notes.md, line 1: holds the token that you are logged in with; remove it and revoke it"]
