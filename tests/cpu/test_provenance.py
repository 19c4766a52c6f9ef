"""What a run was made with."""

import subprocess

from lrsa_ds.logs.provenance import git_state, provenance, versions


def git(directory, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@localhost"]
    return subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True)


def test_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path):
    assert git_state(tmp_path) == {}
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == {}  # no commit yet
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is not a commit")
    commit = git(tmp_path, "rev-parse", "HEAD").stdout.strip()
    assert git_state(tmp_path) == {"git_commit": commit, "git_dirty": False}
    (tmp_path / "not_tracked").write_text("data")
    assert git_state(tmp_path)["git_dirty"] is False
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"git_commit": commit, "git_dirty": True}


def test_a_machine_without_git(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {}


def test_versions_and_sizes():
    assert {"python", "torch", "transformers", "deepspeed"} <= set(versions())
    about = provenance(4, 1000, "CPU")
    assert (about["world_size"], about["num_parameters"], about["device"]) == (4, 1000, "CPU")
    assert about["versions"] == versions()
