"""Rules about Trackio: each passes the good experiment and fails a bad one."""

import pytest
from examples import changed
from rule_cases import HEADER, expect, place, run, with_script, with_sft

from pipeline.rules.tracking import tracking_in_one_place, tracking_stays_private, trackio_is_installed

TRACKED = changed("^  learning_rate: 2e-4$", "  learning_rate: 2e-4\n  tracking: trackio")
CUSTOM = with_script(TRACKED)
INSTALLED = HEADER.replace('"trl==1.16.0"', '"trl==1.16.0", "trackio==0.34.0"')


@pytest.mark.parametrize("rule", [tracking_stays_private, tracking_in_one_place, trackio_is_installed])
def test_ok(rule) -> None:
    assert run(rule) is None
    script = INSTALLED + "SFTConfig(trackio_static_space_id=False)\n"
    assert run(rule, CUSTOM, scripts={"my/train.py": script}) is None
    assert run(rule, TRACKED, scripts={"scripts/train_sft.py": script}) is None


def test_bad_space_of_a_custom_script() -> None:
    finding = run(tracking_stays_private, CUSTOM, scripts={"my/train.py": INSTALLED})
    hint = "pass `trackio_static_space_id=False` to SFTConfig in `my/train.py`"
    expect(finding, "`my/train.py` with `tracking: trackio` may publish a Space", hint, place(CUSTOM, "trackio"))
    public = changed("output: {repo: acme/coach-12b}", "output: {repo: acme/coach-12b, private: false}", CUSTOM)
    assert run(tracking_stays_private, public, scripts={"my/train.py": INSTALLED}) is None


@pytest.mark.parametrize("line", ["trackio_space_id: acme/x", "trackio_bucket_id: acme/x"])
def test_bad_key_of_sft(line) -> None:
    text = with_sft(line)
    key = line.split(":")[0]
    expect(run(tracking_in_one_place, text), f"`{key}` would make", f"remove `{key}`", place(text, "acme/x"))


def test_bad_header() -> None:
    finding = run(trackio_is_installed, TRACKED, scripts={"scripts/train_sft.py": HEADER})
    expect(finding, "`scripts/train_sft.py` does not install `trackio`", "`tracking: none`", place(TRACKED, "trackio"))
