"""Which checkpoints stay."""

import pytest

from ling.checkpoint.folder import DamagedCheckpointError, checkpoints
from ling.checkpoint.retention import leftovers, remove, retire, to_remove
from tests.checkpoint.files import make_run

STEPS = list(range(100, 1100, 100))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (None, None, STEPS),
        (None, 300, STEPS),
        (3, None, [800, 900, 1000]),
        (1, None, [1000]),
        (2, 300, [300, 600, 900, 1000]),
        (1, 100, STEPS),
        (20, None, STEPS),
        (0, None, [1000]),
    ],
)
def test_what_stays(keep_last, keep_every, kept):
    gone = to_remove(STEPS, keep_last, keep_every)
    assert [step for step in STEPS if step not in gone] == kept


def test_nothing_goes_from_nothing():
    assert to_remove([], 1, None) == []


def test_retired_checkpoints_are_renamed_and_then_removed(tmp_path):
    make_run(tmp_path, [2, 4, 6, 8])
    retired = retire(tmp_path, 2, 4)
    assert [path.name for path in retired] == [".step_00000002.removing"]
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6, 8]
    assert leftovers(tmp_path) == retired  # where the process ends here, the next start removes them
    remove(retired)
    assert leftovers(tmp_path) == []


def test_nothing_goes_for_a_newer_one_that_is_not_whole(tmp_path):
    found = make_run(tmp_path, [2, 4])
    (found[4] / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError):
        retire(tmp_path, 1, None)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4]
