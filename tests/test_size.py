"""The tool that counts what there is to read finds each planted excess, and nothing in a source that keeps the limits."""

import re

import pytest
import size

INNER_IMPORTS = ("def f():\n" + "    import a\n\n" * 5
                 + "class C:\n    async def g(self):\n" + "        from a import b, c\n" * 5)
GOOD = ("import a\n\n\nclass C:\n    class D:\n        pass\n\n    @decorated\n    def long(self):\n" + "        x = 1\n" * 39
        + f"# {'w' * 98}\n" + INNER_IMPORTS)
PLANTED = {
    "a file": ("x = 1\n\n" * 301, "has 301 lines that are not blank: at most 300"),
    "a function": ("@decorated\ndef f():\n" + "    x = 1\n" * 40, "line 2: the function f has 41 lines: at most 40"),
    "a method": ("class C:\n    async def f(self):\n" + "        x = 1\n" * 38 + "\n\n        x = 1\n",
                 "line 2: the function f has 42 lines"),
    "a wide line": (f"x = 1\ny = '{'ü' * 96}'\n", "line 2 has 102 characters: at most 100"),
    "a class": ("def f():\n    if x:\n        class C: pass\n", "line 3: the class C is inside the function f"),
    "a class in a method": ("class A:\n    def f(self):\n        class C: pass\n", "line 3: the class C is inside"),
}


@pytest.fixture
def helpers(tmp_path):
    """A folder with a package inside it, in which every limit is just kept."""
    (tmp_path / "helpers" / "fast").mkdir(parents=True)
    (tmp_path / "helpers" / "good.py").write_text(GOOD)
    (tmp_path / "helpers" / "fast" / "full.py").write_text("x = 1\n\n" * 300)
    return tmp_path / "helpers"


def test_what_keeps_the_limits_is_not_reported(helpers, capsys):
    assert size.main(["--check"], helpers) == 0
    assert capsys.readouterr().out == "Every limit is kept.\n"


@pytest.mark.parametrize("planted", PLANTED)
def test_each_planted_excess_is_said_in_a_sentence(helpers, capsys, planted):
    source, said = PLANTED[planted]
    (helpers / "fast" / "bad.py").write_text(source, encoding="utf-8")
    assert size.main(["--check"], helpers) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("helpers/fast/bad.py") and said in line and line.endswith(".")


def test_imports_inside_functions_are_counted_over_all_files(helpers, capsys):
    (helpers / "one_more.py").write_text("import a\ntry:\n    import b\nexcept ImportError:\n    b = None\n"
                                         "def f():\n    def g():\n        import c\n")
    assert size.main(["--check"], helpers) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("11 imports stand inside functions: at most 10 (") and "helpers/good.py line 51, 53, " in line
    assert line.endswith("; helpers/one_more.py line 8).")


def test_the_table_has_a_line_per_file_and_totals(helpers, capsys):
    assert size.main([], helpers) == 0
    head, *rows, totals = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert head == ["file", "lines", "functions > 40", "lines > 100", "inner imports", "inner classes"]
    assert rows == [["fast/full.py", "300", "0", "0", "0", "0"], ["good.py", "59", "0", "0", "10", "0"]]
    assert totals == ["2 files", "359", "0", "0", "10", "0"]


def test_the_real_helpers_can_be_measured(capsys):
    assert size.main([]) == 0
    assert "data.py" in capsys.readouterr().out
