"""Checkpoint manifests."""

from calm.training.state.checkpoint_manifest import SEAL, find_checkpoint, remove_unsealed, rotate, seal


def write(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(bytes([step]))
    seal(checkpoint, {})
    return checkpoint


def test_a_checkpoint_manifest_is_not_named_like_the_file_of_a_finished_run(tmp_path):
    assert (write(tmp_path, 1) / "checkpoint_manifest.json").is_file()
    assert SEAL != "complete.json"


def test_checkpoints_whose_manifest_has_the_old_name_are_read_and_rotated(tmp_path):
    old, new = write(tmp_path, 1), write(tmp_path, 2)
    (old / SEAL).rename(old / "complete.json")
    (tmp_path / "checkpoint-3").mkdir()
    remove_unsealed(tmp_path)
    assert find_checkpoint(tmp_path) == (new, [])
    (new / "weights").write_bytes(b"")
    assert find_checkpoint(tmp_path)[0] == old
    rotate(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
