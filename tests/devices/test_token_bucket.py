"""The rate limit, with a clock of its own: exact to the token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.token_bucket import NANOSECONDS, RateLimit, TokenBucket

MILLISECOND = 10**6


def run(bucket, cost, until_ns, *, start_ns=0, late_ns=0):
    """Ask for ``cost`` again and again, waiting as told (and ``late_ns`` longer); return when each passed."""
    passed, now = [], start_ns
    while now < until_ns:
        wait = bucket.take(cost, now)
        if wait:
            now += wait + late_ns
        else:
            passed.append(now)
    return passed


def test_burst_passes_at_once():
    """Down to 0, and once below: the next one waits until the debt is paid."""
    bucket = TokenBucket(1000, burst=10)
    assert [bucket.take(1, 0) for _ in range(11)] == [0] * 11
    assert bucket.take(1, 0) == MILLISECOND
    assert bucket.take(1, MILLISECOND - 1) == 1
    assert bucket.take(1, MILLISECOND) == 0


def test_request_larger_than_the_bucket_passes_and_then_pays():
    """It never stalls: what it takes beyond the bucket is a debt."""
    bucket = TokenBucket(1000, burst=10)
    assert bucket.take(5000, 0) == 0
    assert bucket.take(1, 0) == 4990 * MILLISECOND
    assert bucket.take(1, 4990 * MILLISECOND - 1) == 1
    assert bucket.take(1, 4990 * MILLISECOND) == 0


def test_waiting_takes_nothing():
    bucket = TokenBucket(10, burst=0)
    assert bucket.take(1, 0) == 0
    assert {bucket.take(1, 0) for _ in range(100)} == {100 * MILLISECOND}


def test_no_more_than_the_burst_is_saved_up():
    bucket = TokenBucket(1000, burst=10)
    bucket.take(1, 0)
    assert len([wait for wait in (bucket.take(1, 3600 * NANOSECONDS) for _ in range(100)) if not wait]) == 11


def test_bucket_without_a_burst_passes_one_at_a_time():
    """Where 10 ms are worth less than one token."""
    passed = run(TokenBucket(50, burst=0), 1, NANOSECONDS)
    assert passed == [20 * MILLISECOND * i for i in range(50)]


def test_free_request_waits_for_the_debt_of_others():
    bucket = TokenBucket(1000, burst=0)
    bucket.take(1, 0)
    assert bucket.take(0, 0) == MILLISECOND


@pytest.mark.parametrize("rate", [100, 333, 1000, 4096, 20_000])
def test_rate_is_met_to_two_percent_over_any_second(rate):
    """A waiter that comes up to 5 ms late makes up for it."""
    passed = run(TokenBucket(rate, burst=rate // 100), 1, 3 * NANOSECONDS, late_ns=MILLISECOND)
    for start in range(0, 2 * NANOSECONDS, 37 * MILLISECOND):
        inside = sum(start <= at < start + NANOSECONDS for at in passed)
        assert abs(inside - rate) <= max(rate * 2 // 100, 1)


@given(
    rate=st.integers(1, 10**10),
    burst=st.integers(0, 10**8),
    asks=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), max_size=50),
)
@settings(max_examples=200, deadline=None)
def test_never_more_than_rate_and_burst(rate, burst, asks):
    """In any stretch: what was there, what came, and one request beyond; and the wait that is told is enough."""
    bucket = TokenBucket(rate, burst)
    now, taken, last = 0, 0, 0
    for cost, pause in asks:
        now += pause
        if wait := bucket.take(cost, now):
            assert bucket.take(cost, now + wait - 1) == 1
            now += wait
            assert bucket.take(cost, now) == 0
        taken += cost
        last = cost
        assert (taken - last) * NANOSECONDS <= burst * NANOSECONDS + rate * now


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, -1)])
def test_nonsense_is_refused(rate, burst):
    with pytest.raises(ValueError, match="allowed"):
        TokenBucket(rate, burst)


def test_rate_limit_has_ten_milliseconds_saved_up():
    """By the host's clock. What passes beyond has to be paid: an hour of the rate takes an hour."""
    limit = RateLimit(100_000)
    assert limit.take(1000) == 0
    assert limit.take(360_000_000) == 0
    assert 3599 * NANOSECONDS < limit.take(1) <= 3600 * NANOSECONDS
