"""Claims: what one process has taken on, no other takes, until it dies."""

import os
import signal
from pathlib import Path

import pytest
from support.running import exit_code_of

from gist_train.data.leases import Claims


def test_each_sees_what_the_others_hold(tmp_path):
    """What is seen too late is done twice; what is seen of oneself is done by nobody."""
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.others() == [b""]
        one.hold(b"first")
        other.hold(b"a longer piece")
        assert (one.others(), other.others()) == ([b"a longer piece"], [b"first"])
        other.hold(b"short")  # in place of the longer one
        assert one.others() == [b"short"]
        with Claims(tmp_path) as third:
            assert sorted(third.others()) == [b"first", b"short"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_is_left_behind(tmp_path, error):
    """A claim that outlives its work is waited for."""
    with Claims(tmp_path) as other:
        try:
            with Claims(tmp_path) as claims:
                claims.hold(b"x")
                if error is not None:
                    raise error
        except KeyboardInterrupt:
            pass
        assert other.others() == []
    assert list(tmp_path.iterdir()) == []


def hold_and_die(folder: Path) -> None:
    claims = Claims(folder)
    claims.hold(b"x")
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_claims_of_the_dead_are_free(tmp_path):
    """A killed process cleans nothing up: its texts would never be embedded, and all others wait for ever."""
    assert exit_code_of(hold_and_die, tmp_path) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with Claims(tmp_path) as claims:
        assert claims.others() == []
        assert len(list(tmp_path.iterdir())) == 1  # the living one's own
