"""The canary names the library that broke a test, and does not blame one that did not."""

import canary
import pytest

NEWER = {"trl": ("1.16.0", "1.17.0"), "scikit-learn": ("1.9.0", "1.9.1"), "numpy": ("2.0.0", "2.1.0")}
NAMES = {"trl": ["trl"], "sklearn": ["scikit-learn"], "numpy": ["numpy"]}
XML = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good[1]"/>
<testcase classname="tests.test_a" name="test_bad[x-y]"><failure message="TypeError: no argument">
File "lib/site-packages/numpy/core.py", line 1
File "lib/site-packages/trl/trainer.py", line 3</failure></testcase>
<testcase classname="" name="tests.test_b"><error message="ImportError: cannot import name z from sklearn"/></testcase>
</testsuite></testsuites>"""


def test_failures_and_suspects_are_read_from_the_report():
    failed = canary.failures(XML)
    assert list(failed) == ["tests/test_a.py::test_bad[x-y]", "tests/test_b.py"]
    assert canary.suspects(failed["tests/test_a.py::test_bad[x-y]"], NEWER, NAMES) == ["trl", "numpy"]
    assert canary.suspects(failed["tests/test_b.py"], NEWER, NAMES) == ["scikit-learn"]
    with pytest.raises(SystemExit, match="no pass"):
        canary.failures("<testsuites/>")


def test_only_what_mends_a_failure_is_blamed():
    tried = []

    def retry(library, tests):
        tried.append(library)
        return set() if library == "trl" else set(tests)

    lines = canary.explain(canary.failures(XML), NEWER, NAMES, retry)
    assert lines == ["trl 1.17.0 breaks tests/test_a.py::test_bad[x-y] (passes with 1.16.0)",
                     "no single newer library explains tests/test_b.py"]
    assert tried == ["trl", "scikit-learn"]


def test_the_pins_are_read():
    assert {"torch", "trl", "scikit-learn"} - set(canary.pins()) <= {"scikit-learn"}
    assert canary.plain("Scikit_Learn") == "scikit-learn"
