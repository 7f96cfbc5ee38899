"""Lease timers of the guard (PROTOCOL F5, F6, F8, D1, G1, G2): values in, orders out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_agent.core.lease import REPEAT_SECONDS, Action, Bounds, Leases, Order, Reason

F, KILL = 10.0, 4.0
TERM_FENCE = Order("a", Action.TERM, Reason.FENCE)
KILL_FENCE = Order("a", Action.KILL, Reason.FENCE)


def leases(sent: float = 0.0, **bounds: object) -> Leases[str]:
    """One generation renewed at `sent`, one attempt `a` in it, started at 0."""
    made: Leases[str] = Leases()
    made.configure(F, KILL)
    made.renew(1, sent, sent)
    made.add("a", Bounds(generation=1, started=0.0, **bounds))  # type: ignore[arg-type]
    return made


def test_term_at_the_fence_and_kill_in_time_to_be_dead_by_f_plus_k() -> None:
    made = leases()
    assert made.due(F - 0.001) == []
    assert made.next_wakeup() == F
    assert made.due(F) == [TERM_FENCE]
    assert made.due(F + 0.1) == []
    kill_at = made.next_wakeup()
    assert kill_at is not None
    assert F < kill_at < F + KILL
    assert made.due(kill_at) == [KILL_FENCE]
    assert made.remove("a", F + KILL) is False


def test_a_renewal_counts_from_its_send_time_and_never_goes_back() -> None:
    made = leases()
    made.renew(1, 5.0, 8.0)
    made.renew(1, 2.0, 8.0)
    assert made.next_wakeup() == 15.0


def test_a_send_time_in_the_future_counts_as_now() -> None:
    made = leases()
    made.renew(1, 500.0, 3.0)
    assert made.next_wakeup() == 13.0


def test_nothing_starts_without_a_lease_and_a_later_renewal_permits_starts_again() -> None:
    made: Leases[str] = Leases()
    assert made.refusal(1, 0.0) is not None
    made.configure(F, KILL)
    assert made.refusal(1, 0.0) is not None
    made.renew(1, 0.0, 0.0)
    assert made.refusal(1, F - 0.001) is None
    assert made.refusal(1, F) is not None
    assert made.refusal(2, 0.0) is not None
    made.renew(1, F + 1, F + 1)
    assert made.refusal(1, F + 1) is None


def test_a_renewal_after_the_fence_does_not_spare_what_was_told_to_end() -> None:
    made = leases()
    assert made.due(F) == [TERM_FENCE]
    made.renew(1, F, F)
    assert made.due(F + KILL) == [KILL_FENCE]


def test_work_kept_at_the_fence_is_left_alone_and_never_late() -> None:
    made = leases(keep_at_fence=True)
    assert made.next_wakeup() is None
    assert made.due(1000.0) == []
    assert made.remove("a", 1000.0) is False


def test_a_guard_that_wakes_too_late_kills_at_once_and_says_late() -> None:
    made = leases()
    assert made.due(F + KILL + 1) == [KILL_FENCE]
    assert made.remove("a", F + KILL + 1) is True


def test_a_death_unseen_until_after_the_bound_is_late_even_without_a_kill() -> None:
    made = leases()
    assert made.remove("a", F + KILL + 0.001) is True


def test_late_is_measured_by_the_lease_that_passed_not_by_a_later_one() -> None:
    made = leases()
    made.due(F + KILL + 1)
    made.renew(1, F + KILL + 1, F + KILL + 1)
    assert made.remove("a", F + KILL + 1.1) is True


def test_an_adopted_attempt_keeps_its_old_timer_until_the_new_generation_is_renewed() -> None:
    made = leases()
    assert made.adopt("a", 2) is True
    assert made.generation("a") == 2
    assert made.next_wakeup() == F
    made.renew(2, 8.0, 8.0)
    assert made.next_wakeup() == 18.0
    assert made.adopt("unknown", 2) is False


def test_renewing_the_old_generation_no_longer_serves_an_adopted_attempt() -> None:
    made = leases()
    made.adopt("a", 2)
    made.renew(1, 9.0, 9.0)
    assert made.due(F) == [TERM_FENCE]


def test_kill_falls_on_the_deadline_and_term_one_grace_period_earlier() -> None:
    """D1."""
    made = leases(stop_at=8.0, grace_seconds=2.0)
    assert made.due(5.999) == []
    assert made.due(6.0) == [Order("a", Action.TERM, Reason.DEADLINE)]
    assert made.due(7.999) == []
    assert made.due(8.0) == [Order("a", Action.KILL, Reason.DEADLINE)]


def test_d1_a_short_deadline_leaves_three_quarters_of_its_time_before_term() -> None:
    made = leases(stop_at=2.0, grace_seconds=3.0)
    assert made.due(1.499) == []
    assert made.due(1.5) == [Order("a", Action.TERM, Reason.DEADLINE)]
    assert made.due(2.0) == [Order("a", Action.KILL, Reason.DEADLINE)]


def test_a_timeout_is_time_to_work_and_its_grace_comes_after_it() -> None:
    made = leases(timeout_seconds=2.0, grace_seconds=3.0)
    assert made.due(1.999) == []
    assert made.due(2.0) == [Order("a", Action.TERM, Reason.TIMEOUT)]
    assert made.due(4.999) == []
    assert made.due(5.0) == [Order("a", Action.KILL, Reason.TIMEOUT)]


def test_d1_the_grace_of_a_timeout_never_outlasts_the_deadline() -> None:
    made = leases(timeout_seconds=2.0, stop_at=4.0, grace_seconds=3.0)
    assert made.due(2.0) == [Order("a", Action.TERM, Reason.TIMEOUT)]
    assert made.due(4.0) == [Order("a", Action.KILL, Reason.TIMEOUT)]


def test_the_first_term_names_the_reason_and_the_earliest_kill_counts() -> None:
    made = leases(stop_at=9.0, grace_seconds=1.0)
    made.cut("a", Reason.STOP, 7.0, 30.0)
    assert made.due(7.0) == [Order("a", Action.TERM, Reason.STOP)]
    assert made.due(9.0) == [Order("a", Action.KILL, Reason.STOP)]


def test_a_stop_without_grace_kills_at_once_and_a_second_one_only_hastens() -> None:
    made = leases()
    made.cut("a", Reason.STOP, 1.0, 5.0)
    assert made.due(1.0) == [Order("a", Action.TERM, Reason.STOP)]
    made.cut("a", Reason.STOP, 2.0, 50.0)
    made.cut("a", Reason.STOP, 2.0, 0.0)
    assert made.due(2.0) == [Order("a", Action.KILL, Reason.STOP)]


def test_a_kill_is_repeated_until_the_death_is_seen() -> None:
    made = leases()
    made.cut("a", Reason.STOP, 1.0, 0.0)
    assert made.due(1.0) == [Order("a", Action.KILL, Reason.STOP)]
    assert made.next_wakeup() == 1.0 + REPEAT_SECONDS
    assert made.due(1.0 + REPEAT_SECONDS) == [Order("a", Action.KILL, Reason.STOP)]
    made.remove("a", 2.5)
    assert made.next_wakeup() is None


def test_shrinking_f_counts_for_what_runs() -> None:
    made = leases()
    made.configure(3.0, 1.0)
    assert made.due(3.0) == [TERM_FENCE]


@pytest.mark.parametrize(("fence", "kill"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_lease_values_must_be_positive(fence: float, kill: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Leases[str]().configure(fence, kill)


def test_many_generations_do_not_pile_up_and_old_ones_stay_refused() -> None:
    made = leases()
    for generation in range(2, 500):
        made.renew(generation, generation * 100.0, generation * 100.0)
    assert made.refusal(3, 50_000.0) is not None
    assert made.refusal(499, 49_901.0) is None


@given(
    renewals=st.lists(st.tuples(st.floats(0, 50), st.floats(0, 5)), max_size=10),
    step=st.floats(0.01, 0.4),
)
def test_whatever_is_renewed_a_kill_goes_out_before_f_plus_k_of_the_last_renewal(
    renewals: list[tuple[float, float]], step: float
) -> None:
    """A guard that looks at least every `step` never lets an attempt outlive its lease (F5)."""
    made = leases()
    arrivals = sorted((sent + delay, sent) for sent, delay in renewals)
    now, last = 0.0, 0.0
    while True:
        now += step
        orders = made.due(now)
        if any(order.action is Action.KILL for order in orders):
            break
        while arrivals and arrivals[0][0] <= now:
            last = max(last, arrivals.pop(0)[1])
            made.renew(1, last, now)
    assert now <= last + F + KILL - 0.5 + step + 1e-9
    assert made.reason("a") is Reason.FENCE
