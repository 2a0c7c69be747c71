"""The first signal asks, the second ends; what came before listening comes back after it."""

import os
import signal

import pytest

from onebase.train.stop import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_is_a_request(number):
    stop = StopRequest()
    with stop.listening():
        _send(number)
        assert stop.signal_number == number


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, None)])
def test_a_second_signal_ends_at_once_with_its_own_exit_code(first, second, code):
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt if code is None else SystemExit) as caught, stop.listening():
        _send(first, second)
    assert getattr(caught.value, "code", None) == code


def test_a_closed_terminal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    with stop.listening():
        _send(signal.SIGHUP)
    assert stop.signal_number is None


def test_afterwards_signals_do_what_they_did_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest().listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
