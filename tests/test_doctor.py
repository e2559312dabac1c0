"""The doctor's findings."""

import json

import pytest
from packaging.requirements import Requirement

from diffalign import cli, doctor


def test_the_doctor_finds_nothing_wrong_with_what_ships(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--json"])
    report = json.loads(capfd.readouterr().out)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert report["ok"] == all(finding["ok"] for finding in report["findings"])
    for name in ("python", "configs", "prompts/shapes-heldout.jsonl", "load tiny-sd"):
        assert findings[name]["ok"], findings[name]


def test_a_package_that_is_missing_or_too_old_comes_with_its_fix() -> None:
    missing = doctor.package(Requirement("no-such-package-for-diffalign>=1"))
    assert not missing.ok and missing.fix == "pip install 'no-such-package-for-diffalign>=1'"
    old = doctor.package(Requirement("torch>=1000"))
    assert not old.ok and "1000" in old.fix
    assert doctor.package(Requirement("torch")).ok


def test_a_missing_asset_is_a_finding_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHIPPED_FILES", ("no-such-file",))
    monkeypatch.setattr(doctor, "SHIPPED", ())
    (finding,) = doctor.shipped()
    assert not finding.ok and "no-such-file" in finding.detail
