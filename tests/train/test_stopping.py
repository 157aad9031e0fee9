"""Ctrl-C is noted first, and stops at once the second time."""

from __future__ import annotations

import signal
import time

import pytest

from atod_train.training import stopping
from atod_train.training.stopping import interruptible


@pytest.mark.usefixtures("usual_sigint")
def test_a_second_ctrl_c_stops_but_not_its_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ECHO_SECONDS", 0.2)
    with interruptible(announce=False) as noted:
        assert not noted
        signal.raise_signal(signal.SIGINT)
        # A launcher passes on what the terminal has sent already.
        signal.raise_signal(signal.SIGINT)
        assert len(noted) == 1
        time.sleep(0.25)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
