"""Who may wait, when all want to."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdfs.admission import Admission, Request, about_to_wait, current
from etcdfs.errors import BusyError


def takes(admission: Admission, user: int) -> bool:
    try:
        admission.take(user)
    except BusyError:
        return False
    return True


def greedy(places: int, users: int) -> Counter[int]:
    """Return what users get who take in turn whatever they can get."""
    admission = Admission(places)
    got: Counter[int] = Counter()
    wanting = set(range(users))
    while wanting:
        for user in sorted(wanting):
            if takes(admission, user):
                got[user] += 1
            else:
                wanting.remove(user)
    assert admission.statistics().waiting == got.total()
    return got


@pytest.mark.parametrize("users", range(1, 10))
def test_each_gets_the_same_and_as_much_is_left(users: int) -> None:
    part = 1000 // (users + 1)
    assert all(abs(got - part) <= users for got in greedy(1000, users).values())


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=200))
def test_who_comes_next_finds_a_place(steps: list[tuple[bool, int]]) -> None:
    admission = Admission(20)
    got: Counter[int] = Counter()
    for is_taking, user in steps:
        if is_taking:
            got[user] += takes(admission, user)
        elif got[user]:
            admission.give_back(user)
            got[user] -= 1
        assert admission.statistics().waiting == got.total() < 20
    assert takes(admission, 99)


def test_a_request_has_one_place_and_gives_it_back() -> None:
    admission = Admission(2)
    request = Request(admission, lambda: 7)
    token = current.set(request)
    try:
        assert admission.statistics().waiting == 0, "it may well be answered from memory"
        about_to_wait()
        about_to_wait()
        assert admission.statistics().waiting == 1
        current.set(Request(admission, lambda: 7))
        with pytest.raises(BusyError):
            about_to_wait()
        assert admission.statistics().refused == 1
        request.end()
        about_to_wait()
        current.set(request)
        about_to_wait()  # a task that outlives the request that started it
        assert admission.statistics().waiting == 1
    finally:
        current.reset(token)


def test_what_nobody_asked_for_is_not_refused() -> None:
    about_to_wait()
