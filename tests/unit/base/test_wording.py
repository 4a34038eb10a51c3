"""How numbers and words are printed."""

import pytest

from gradnoise.base.errors import InputError
from gradnoise.base.wording import check_rehearsal, interval, number, p_value, percent, threshold


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (0.09123456, "0.0912"),
        (-1.2, "−1.20"),
        (0.9996, "1.00"),
        (9999.6, "10,000"),
        (12345678.0, "1.23 × 10⁷"),
        (0.0000123456, "1.23 × 10⁻⁵"),
        (0.0, "0"),
        (9216, "9,216"),
        (None, "–"),
    ],
)
def test_numbers_keep_three_significant_digits(value: float | None, printed: str) -> None:
    assert number(value) == printed


@pytest.mark.parametrize(
    ("p", "printed"),
    [
        (0.0364, "= .036"),
        (0.0009, "< .001"),
        (0.23, "= .230"),
        (1.0, "= 1.000"),
        (0.0504, "= .0504"),
        (0.04996, "= .04996"),
        (0.05, "= .050"),
        (None, "–"),
    ],
)
def test_p_values_are_never_rounded_onto_alpha(p: float | None, printed: str) -> None:
    assert p_value(p, alpha=0.05) == printed


def test_thresholds_are_printed_as_the_plan_has_them() -> None:
    assert [threshold(value) for value in (0.05, 0.0725, 9216.0, 1e-8)] == [
        "0.05",
        "0.0725",
        "9,216",
        "1e-08",
    ]
    assert percent(0.95) == "95%"
    assert interval(-0.0567, 0.125) == "[−0.0567, 0.125]"
    assert interval(None, 0.1) == "–"


@pytest.mark.parametrize(
    "text",
    [
        "H1 is confirmed",
        "Nonsignificant",
        "SIGNIFICANCE",
        "corroborates",
        "an unfalsified claim",
        "the arms are equivalent",
        "proven",
        "this does not prove it",
        "this supports the hypothesis",
        "the runs support our second hypothesis",
        "support for H1",
        "H1 was rejected",
        "which rejects the null",
        "the hypothesis is supported",
        "H3 is unsupported",
        "we accept H1",
        "H1 is accepted",
        "the effect is validated",
        "the study validates H4",
        "this demonstrates that noise helps",
        "a demonstration of the effect",
        "it is well-established",
        "this establishes the rule",
        "strong evidence for H1",
        "no evidence against it",
        "equivalence was shown",
        "equivalence is shown",
    ],
)
def test_words_of_the_registered_study_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="caption"):
        check_rehearsal(f"We see: {text}.", "caption")


def test_plain_words_pass() -> None:
    check_rehearsal(
        "Condition met; improved; three significand bits; an equivalence margin; validation loss; "
        "known classes without support in the context; it speaks neither for nor against a hypothesis.",
        "text",
    )
