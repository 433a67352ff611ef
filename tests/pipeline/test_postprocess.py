from __future__ import annotations

from pathlib import Path

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.corpora import read_lines
from t5x_ext.evaluate import bleu
from t5x_ext.pipeline import POSTPROCESSORS, GreedyEnsemble, Translate, narrow_punctuation, widen_punctuation
from t5x_ext.pipeline.postprocess import postprocessor
from t5x_ext.vega_mt import widen_as_released

WMT22 = Path(__file__).parents[3] / "shared/data/wmt22"


@pytest.mark.parametrize(
    ("line", "chinese"),
    [
        ("你好,世界.", "你好，世界。"),
        ("你好, 世界!", "你好，世界！"),
        ("他问:真的吗?!", "他问：真的吗？！"),
        ("苹果公司(Apple Inc.)很大;真的.", "苹果公司（Apple Inc.）很大；真的。"),
        ("Apple (苹果) 很大", "Apple（苹果）很大"),
        ("see (this) 在这里", "see（this）在这里"),
        ("see (this) here 在这里", "see (this) here 在这里"),
        ("在 10:30, 约 3,000 人和 2.5 米", "在 10:30，约 3,000 人和 2.5 米"),
        ("2022年,共 3,000 人,比分 3:2.", "2022年，共 3,000 人，比分 3:2。"),
        ("他用 Microsoft Word 写 Hello, world", "他用 Microsoft Word 写 Hello, world"),
        ("他在 Google 工作.", "他在 Google 工作。"),
        ("他在 Google.", "他在 Google。"),
        ('他说"好."', '他说"好。"'),
        ("等一下...", "等一下..."),
        ("1.苹果", "1.苹果"),
        ("网址 http://a.b/c?d=e", "网址 http://a.b/c?d=e"),
        ("A.B. said: yes.", "A.B. said: yes."),
        ("", ""),
        (".", "."),
        ("你好。", "你好。"),
    ],
)
def test_only_what_stands_in_chinese_is_widened(line, chinese):
    assert widen_punctuation(line, "zh_CN") == chinese
    assert widen_punctuation(chinese, "zh") == chinese
    assert [char for char in chinese if char.isdigit()] == [char for char in line if char.isdigit()]
    for language in ("en", "de", "ko"):
        assert widen_punctuation(line, language) == line


def test_japanese_has_its_own_comma():
    assert widen_punctuation("東京は,大きいです.(Tokyo)", "ja") == "東京は、大きいです.(Tokyo)"
    assert widen_punctuation("カタカナ,ひらがな.", "ja") == "カタカナ、ひらがな。"


def test_narrow_is_the_inverse_where_everything_stands_in_chinese():
    line = "你好，世界！真的（吗）？是；对：好"
    assert narrow_punctuation(line) == "你好,世界!真的(吗)?是;对:好"
    assert widen_punctuation(narrow_punctuation(line), "zh") == line


def test_the_released_script_with_its_quirks():
    assert widen_as_released("你好, big world.", "zh") == "你好，bigworld．"
    assert widen_as_released("共3.5米,好,2022年", "zh_CN") == "共3.5米，好,2022年"
    # Before the first character stands the last one.
    assert widen_as_released("(a)3", "zh") == "(a)3"
    assert widen_as_released("(a)b", "zh") == "（a）b"
    assert widen_as_released("(a)b", "ja") == "(a)b"


def test_a_postprocessor_is_a_name_of_the_table_or_any_function(monkeypatch):
    upper = lambda line, language: line.upper()
    assert postprocessor(upper) is upper
    assert postprocessor("widths") is widen_punctuation
    with pytest.raises(UserError, match=r"'upper': must be one of 'widths', 'none', or a function \(line, language\)"):
        postprocessor("upper")
    monkeypatch.setitem(POSTPROCESSORS, "upper", upper)
    assert postprocessor("upper") is upper
    for stage in (
        lambda name: Translate("out", "model", ("test",), postprocess=name),
        lambda name: GreedyEnsemble("best", ("model",), ("test",), postprocess=name),
    ):
        assert stage("upper").postprocess == "upper"
        with pytest.raises(UserError, match="postprocess = 'lower'"):
            stage("lower")
        with pytest.raises(UserError, match="give the function, @t5x_ext"):
            stage("released")


@pytest.mark.realdata
@pytest.mark.skipif(not WMT22.is_dir(), reason=f"needs the outputs of WMT22 in {WMT22}")
def test_what_the_width_of_punctuation_is_worth_on_the_submitted_chinese():
    """BLEU of Vega-MT's submission as it is, narrowed, by the released script, and by ours from the narrowed file."""
    submitted = list(read_lines(str(WMT22 / "system-outputs/generaltest2022.en-zh.hyp.JDExploreAcademy.zh")))
    reference = list(read_lines(str(WMT22 / "references/generaltest2022.en-zh.ref.A.zh")))
    score = lambda lines: bleu(lines, reference, "zh").value
    narrow = [narrow_punctuation(line) for line in submitted]
    assert score(submitted) == pytest.approx(49.669, abs=5e-4)
    assert score(narrow) == pytest.approx(44.777, abs=5e-4)
    released = [widen_as_released(line, "zh") for line in submitted]
    assert score(released) == pytest.approx(48.863, abs=5e-4)
    assert sum(line == other for line, other in zip(submitted, released)) == 1619
    # Ours gives back all that was lost, and what the submission had left narrow beside.
    assert score([widen_punctuation(line, "zh") for line in narrow]) == pytest.approx(49.998, abs=5e-4)
    assert score([widen_punctuation(line, "zh") for line in submitted]) == pytest.approx(49.954, abs=5e-4)
