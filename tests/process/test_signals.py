from app.process.signals import REPEAT_S, ReceivedSignals


def test_repeats_within_the_interval_are_one_signal() -> None:
    now = 100.0
    signals = ReceivedSignals(lambda: now)
    assert signals.add(15)
    now += 0.9 * REPEAT_S
    assert not signals.add(15)
    now += 0.2 * REPEAT_S
    assert signals.add(2)
    assert len(signals) == 2
    assert [signals.count(number) for number in (15, 2, 1)] == [1, 1, 0]
