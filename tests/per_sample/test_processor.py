import platform
import sys
from pathlib import Path

import pytest

from dyn_lightning.per_sample import processor

VENDOR = processor._vendor.__wrapped__  # which remembers nothing
INTEL, AMD = "vendor_id\t: GenuineIntel", "vendor_id\t: AuthenticAMD"


def pretend(system: str, lines: list[str] | None, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let a system say of its processor these lines of cpuinfo, if it has any, and to Python this name."""
    if lines is not None:
        (folder / "cpuinfo").write_text("\n".join(lines))
    monkeypatch.setattr(processor, "CPUINFO", folder / "cpuinfo")
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "processor", lambda: name)


@pytest.mark.parametrize(
    ("system", "lines", "name", "intel"),
    [
        ("linux", ["processor\t: 0", INTEL, "processor\t: 1", INTEL], "", True),
        ("linux", ["processor\t: 0", AMD], "Intel", False),
        ("linux", ["CPU implementer\t: 0x41"], "", False),
        ("linux", None, "", False),  # it does not say
        ("win32", None, "Intel64 Family 6 Model 158 Stepping 9, GenuineIntel", True),
        ("win32", None, "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", False),
        ("darwin", None, "i386", True),
        ("darwin", None, "arm", False),
    ],
)
def test_whether_it_is_intel_s(
    system: str, lines: list[str] | None, name: str, intel: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(system, lines, name, monkeypatch, tmp_path)
    monkeypatch.setattr(processor, "_vendor", VENDOR)
    assert processor.is_intel() == intel


@pytest.mark.parametrize(
    ("system", "lines", "name"),
    [
        (
            "linux",
            ["processor: 0", AMD, "cpu family: 25", "model\t: 17", "model name\t: AMD EPYC", "", "processor: 1"],
            "AMD EPYC (AuthenticAMD, family 25, model 17)",
        ),
        ("linux", ["CPU implementer\t: 0x41"], "said by Python"),
        ("darwin", None, "said by Python"),
    ],
)
def test_processor_name(
    system: str, lines: list[str] | None, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(system, lines, "said by Python", monkeypatch, tmp_path)
    assert processor.processor_name() == name
