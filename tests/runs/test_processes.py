"""How the processes of a job meet, also after some of them have ended."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from finetune.errors import RunError
from finetune.runs import processes
from finetune.runs.processes import meet


def all_meet(store: HashStore, restarted: Sequence[bool]) -> list[tuple[str, bool]]:
    """Let a process for each of `restarted` meet the others."""
    count = len(restarted)
    with ThreadPoolExecutor(count) as pool:
        joins = [pool.submit(meet, store, rank, count, is_restarted=restarted[rank]) for rank in reversed(range(count))]
        return [join.result(timeout=10) for join in joins]


def test_all_agree_on_a_name_and_that_this_is_the_first_start() -> None:
    found = all_meet(HashStore(), [False, False, False])
    assert len(set(found)) == 1
    assert not found[0][1]


@pytest.mark.parametrize("restarted", [[True, False, False], [False, False, True]])
def test_after_a_restart_that_one_machine_counts_all_know_of_it_and_have_another_name(restarted: list[bool]) -> None:
    store = HashStore()
    before = all_meet(store, [False, False, False])
    after = all_meet(store, restarted)
    assert len(set(after)) == 1
    assert after[0][1]
    assert after[0][0] != before[0][0]


def test_a_start_that_ended_before_all_had_come_is_not_mistaken_for_this_one() -> None:
    store = HashStore()
    store.set("start", "first-ended")
    store.set("first-ended/1", "first-ended-too")
    found = all_meet(store, [False, True])
    assert found[0] == found[1]
    assert found[0][0] != "first-ended"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_waits_in_vain_says_so(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(processes, "STEP_TIMEOUT", processes.STEP_TIMEOUT * 0.001)
    with pytest.raises(RunError, match=f"process {rank} of 2 has not met the others"):
        meet(HashStore(), rank, 2, is_restarted=False)
