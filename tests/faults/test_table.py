"""docs/reliability.md says what the tests say, of every fault."""

from pathlib import Path

import pytest

from tests.faults import table


def test_every_fault_is_answered() -> None:
    assert list(table.FAULTS) == list(range(1, 51))
    assert set(table.answers()) == set(table.FAULTS)


def test_the_page_is_current() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(table.answers()), "run python -m tests.faults.table"


def test_what_the_table_reads(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "NOT_APPLICABLE: dict[int, str] = {9: 'no disk'}\n"
        "def test_case_09_a():\n    '''A | b <c>.\n\n    More.'''\n"
        "def test_case_10_b():\n    '''Once.'''\ndef test_case_10_c():\n    '''Twice.'''\ndef test_other():\n    pass\n"
    )
    found = table.answers(tmp_path)
    assert [answer.outcome for answer in found[9]] == ["Cannot occur: no disk", "A | b <c>."]
    assert "| Once.<br>Twice. | `test_x.py::test_case_10_b`<br>`test_x.py::test_case_10_c` |" in table.page(found)
    assert "A \\| b &lt;c>." in table.page(found)
    (tmp_path / "test_x.py").write_text("def test_case_09_a():\n    pass\n")
    with pytest.raises(ValueError, match=r"test_x\.py:1: test_case_09_a does not say what happens"):
        table.answers(tmp_path)
