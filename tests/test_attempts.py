"""Attempts at a run: their numbers only rise, their checkpoints are whole, and only one writes."""

import multiprocessing

from longyarn.core import attempts


def checkpoint(work, attempt: int, step: int, whole: bool = True):
    directory = work / f"attempt-{attempt:04d}" / f"checkpoint-{step}"
    (directory / "shards").mkdir(parents=True)
    (directory / "shards" / "weights").write_bytes(b"12345678")
    if whole:
        attempts.mark_whole(directory)
    return directory


def test_each_attempt_has_a_higher_number_and_replaces_those_before(tmp_path):
    first = attempts.claim(tmp_path / "work")
    assert first.name == "attempt-0001" and first.is_dir()
    assert not attempts.superseded(first)
    second = attempts.claim(tmp_path / "work")
    assert second.name == "attempt-0002"
    assert attempts.superseded(first) and not attempts.superseded(second)


def test_numbers_go_on_after_older_attempts_were_removed(tmp_path):
    first, second = attempts.claim(tmp_path), attempts.claim(tmp_path)
    attempts.remove_older(second)
    assert not first.exists() and second.exists()
    assert attempts.superseded(first)
    assert attempts.claim(tmp_path).name == "attempt-0003"


def test_numbers_are_compared_as_numbers(tmp_path):
    old, new = tmp_path / "attempt-9999", tmp_path / "attempt-10000"
    old.mkdir()
    new.mkdir()
    attempts.remove_older(old)
    assert new.exists()
    assert attempts.superseded(old)
    attempts.remove_older(new)
    assert new.exists() and not old.exists()


def test_processes_that_claim_at_once_all_get_their_own(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        claimed = pool.map(attempts.claim, [tmp_path] * 40)
    assert sorted(path.name for path in claimed) == [f"attempt-{n:04d}" for n in range(1, 41)]


def test_the_last_checkpoint_is_the_whole_one_of_most_steps(tmp_path):
    assert attempts.last_checkpoint(tmp_path) is None
    newest = checkpoint(tmp_path, 1, 90)
    checkpoint(tmp_path, 2, 30)
    checkpoint(tmp_path, 2, 100, whole=False)
    assert attempts.last_checkpoint(tmp_path) == newest
    assert attempts.describe(newest) == "attempt-0001/checkpoint-90"


def test_a_checkpoint_that_lost_a_file_or_a_byte_is_not_whole(tmp_path):
    older = checkpoint(tmp_path, 1, 3)
    cut, emptied = checkpoint(tmp_path, 1, 6), checkpoint(tmp_path, 1, 9)
    (cut / "shards" / "weights").write_bytes(b"1234567")
    (emptied / "shards" / "weights").unlink()
    assert attempts.last_checkpoint(tmp_path) == older
