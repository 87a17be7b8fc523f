import numpy as np
import pytest

from finetune.data.looks import FAULTS, Look, Looks, Stamp, gather_looks, known_looks, path_keys, write_looks
from finetune.runs.processes import Processes


def look_at(number, reason=None):
    if reason:
        return Look(stamp=Stamp(number, 1, 256), reason=reason, detail=f"detail {number}")
    return Look(stamp=Stamp(number, 1, 256), sha256=f"{number:064x}", perceptual_hash=number + 1, size_px=(number, 9))


def looks_of(looks):
    """Return the looks at files by their names."""
    made = Looks.empty(path_keys(looks, len(looks)))
    for place, look in enumerate(looks.values()):
        made.put(place, look)
    return made


def same(found, expected):
    alike = (np.array_equal(*both) for both in zip(found.columns(), expected.columns(), strict=True))
    return all(alike) and found.details == expected.details


@pytest.fixture
def file(tmp_path):
    return tmp_path / "looks.npz"


NAMES = [f"a/{number}.png" for number in range(40)]
REASONS = [FAULTS[-1] if number % 3 == 0 else None for number in range(40)]


def test_kept_looks_are_known_in_any_order_beside_new_ones(file):
    before = {name: look_at(number, REASONS[number]) for number, name in enumerate(NAMES)}
    write_looks(file, looks_of(before))
    asked = [*NAMES[30:], "new.png", *NAMES[:10]]
    found = known_looks(file, path_keys(asked, len(asked)))
    expected = Looks.empty(path_keys(asked, len(asked)))
    for place, name in enumerate(asked):
        if name in before:
            expected.put(place, before[name])
    assert same(found, expected)


def test_fresh_looks_take_the_place_of_kept_ones_and_others_stay(file):
    before = {name: look_at(number, REASONS[number]) for number, name in enumerate(NAMES)}
    fresh = {name: look_at(number + 100, REASONS[number - 1]) for number, name in enumerate(NAMES) if number % 4}
    write_looks(file, looks_of(before))
    write_looks(file, looks_of(fresh | {"new.png": look_at(5)}))
    expected = looks_of(before | fresh | {"new.png": look_at(5)})
    assert same(known_looks(file, expected.keys), expected)


def test_a_passing_fault_leaves_what_was_known(file):
    before = looks_of({"a.png": look_at(1), "b.png": look_at(2)})
    write_looks(file, before)
    write_looks(file, looks_of({"a.png": look_at(3, "missing"), "c.png": look_at(4)}))
    assert same(known_looks(file, before.keys), before)


def test_a_look_replaces_a_fault():
    looks = looks_of({"a.png": look_at(1, FAULTS[-1])})
    looks.put(0, look_at(2))
    assert same(looks, looks_of({"a.png": look_at(2)}))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_looks_of_all_processes_are_gathered_in_the_order_of_the_files(count):
    looks = {name: look_at(number, REASONS[number]) for number, name in enumerate(NAMES[:8])}
    shares = [looks_of(dict(list(looks.items())[rank::count])) for rank in range(count)]

    class Others(Processes):
        def gather(self, value):
            if isinstance(value, dict):
                return [share.details for share in shares]
            place = next(place for place, column in enumerate(shares[0].columns()) if column is value)
            return [share.columns()[place] for share in shares]

    assert same(gather_looks(shares[0], Others(count=count)), looks_of(looks))
