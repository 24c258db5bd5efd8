"""An answer as one formula that math-verify reads, without what is written around it."""

import re

from train.rl.rewards import answer

_SYMBOLS = {
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "°": r"^{\circ}",
    "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    # Signs that look like a minus, and spaces of other widths.
    "−": "-",
    "–": "-",
    "\u2011": "-",
    "\u2009": " ",
    "\u202f": " ",
    "\u00a0": " ",
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
# A comma or a thin space between the thousands of a number.
_THOUSANDS_PATTERN = re.compile(r"(?<=\d)(?:\\[,;:! ]|~|\{,\}|,\\!)(?=\d{3}(?!\d))")
_SPACED_THOUSANDS_PATTERN = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_EXPONENT_PATTERN = re.compile(r"([+-]?\d+\.?\d*)[eE]([+-]?\d+)")
_MIXED_PATTERN = re.compile(r"(-?\d+)\s+(\d+)/(\d+)")
_ROOT_PATTERN = re.compile(r"√\s*(?:\(([^()]*)\)|(\w+))")
_REPEATING_PATTERN = re.compile(
    r"(-?)(\d*)\.(\d*)(?:\\overline\s*\{(\d+)\}|\\overline\s*(\d)|\\dot\s*\{(\d)\}|\((\d+)\))"
)
# The letter of a choice before its value, as in AMC problems: \textbf{(C)}\ 12.
_CHOICE_PREFIX_PATTERN = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\(?[A-E]\)?\s*\}|\([A-E]\))"
    r"(?:\\[ ,;]|\\q?quad|~|\s|:)*(?=\S)"
)
_OUTER_SPACE_PATTERN = re.compile(
    r"^(?:\\[ ,;:!]|~|\\q?quad\b|\s)+|(?:\\[ ,;:!]|~|\\q?quad\b|[\s;,]|\\$)+$"
)
_NUMBER = r"[-+]?\\?\$?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_UNIT_PATTERN = re.compile(
    rf"({_NUMBER})\s*((?:[A-Za-z]{{2,}}[ -]?){{1,3}}|[A-Za-z]+/[A-Za-z]+(?:\^?\{{?2\}}?)?)"
)
# Words after a number that change its value, and words between two answers.
_VALUE_WORD_PATTERN = re.compile(
    r"(?i)\b(?:or|and|not|nor|to|between|than|hundred|thousand|[mbtr]+illion|dozen|half|halves|thirds?"
    r"|quarters?|percent|pi|squared|cubed|factorial|over|times|plus|minus|mod|divided|less|more"
    r"|remainder|power|sqrt|sin|cos|tan|log|ln|exp|fifths?|tenths?)\b"
)
_HEDGE_PATTERN = re.compile(r"(?i)\b(?:or|not|nor|between|either|maybe|perhaps)\b")
# A bound is not a value.
_BOUND_PATTERN = re.compile(r"(?i)\bat (?:least|most)\b|\b(?:more|less|fewer|greater) than\b")
# What explains an answer, after it.
_REASON_PATTERN = re.compile(r"(?is)[\s,;(]+(?:since|because|from|see|which|where|when|as in)\b.*")
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_WORDS_PATTERN = re.compile(r"(?=.{3})[A-Za-z]{2,}(?:[ '-]+[A-Za-z]{2,})*")
_FUNCTION_PATTERN = re.compile(
    r"(?i)\b(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|abs|max|min|gcd|lcm|mod|det)\b"
)
# A dollar sign beside a space is one of money.
_INLINE_PATTERN = re.compile(
    r"\$\$(.+?)\$\$|\$(?!\s)([^$]+)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_PLAIN_WORD_PATTERN = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?![A-Za-z]*\})")


def normalize_formula(text: str) -> str:
    """Return an answer or a label as one formula of LaTeX."""
    text = _OUTER_SPACE_PATTERN.sub("", answer.clean_answer(text))
    if (word := strip_text_command(text).casefold()) in _NUMBER_WORDS:
        return str(_NUMBER_WORDS.index(word))
    for symbol, latex in _SYMBOLS.items():
        text = text.replace(symbol, latex)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _ROOT_PATTERN.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = re.sub(r"(?i)(?<=\d)\s*(?:percent|per cent)\b", r"\\%", text)
    text = _THOUSANDS_PATTERN.sub("", text)
    text = _REPEATING_PATTERN.sub(_to_fraction, text)
    if prefix := _CHOICE_PREFIX_PATTERN.match(text):
        text = text[prefix.end() :]
    text = re.sub(r"\((or|and)\b([^()]*)\)", r"\1\2", text)
    if _SPACED_THOUSANDS_PATTERN.fullmatch(text):
        text = text.replace(" ", "")
    if match := _EXPONENT_PATTERN.fullmatch(text):
        text = rf"{match[1]} \times 10^{{{int(match[2])}}}"
    if match := _MIXED_PATTERN.fullmatch(text):
        text = rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}"
    if (match := _UNIT_PATTERN.fullmatch(text)) and not _VALUE_WORD_PATTERN.search(match[2]):
        text = match[1]
    return answer.clean_answer(text)


def read_sentence(text: str) -> str | None:
    """Return the one formula that a sentence says, or None where it says none or several.

    A text without words is its own formula.
    """
    if _BOUND_PATTERN.search(text):
        return None
    text = _REASON_PATTERN.sub("", text)
    formulas = [next(filter(None, match.groups())) for match in _INLINE_PATTERN.finditer(text)]
    outside = _INLINE_PATTERN.sub(" ", text)
    if len(formulas) > 1 or (formulas and _HEDGE_PATTERN.search(outside)):
        # Several formulas are one answer only as a list: $1$ and $2$.
        is_list = not re.sub(r"\b(?:and|or)\b|[\s,;.]", "", outside)
        return ", ".join(formulas) if is_list else None
    if formulas:
        return None if re.search(r"\d", outside) else formulas[0]
    if not _PLAIN_WORD_PATTERN.search(text) or not text.split()[1:]:
        return text
    if _HEDGE_PATTERN.search(text) or re.search(r"[=\\^]", text):
        return text
    numbers = re.findall(rf"{_NUMBER}(?:/\d+)?(?:\s*\\?%)?", text)
    return numbers[0] if len(numbers) == 1 and not _VALUE_WORD_PATTERN.search(text) else text


def find_last_formula(text: str) -> str | None:
    """Return the last formula or number of the last line, where a text has no form of an answer."""
    line = (text.strip().splitlines() or [""])[-1]
    if _HEDGE_PATTERN.search(line):
        return None
    formulas = [next(filter(None, match.groups())) for match in _INLINE_PATTERN.finditer(line)]
    numbers = re.findall(rf"(?<![\w.]){_NUMBER}(?:/\d+)?(?:\s*\\?%)?(?![\w])", line)
    if formulas:
        return formulas[-1]
    line = answer.clean_answer(line)
    if not _PLAIN_WORD_PATTERN.search(line):
        return line or None
    return numbers[-1] if numbers and not _VALUE_WORD_PATTERN.search(line) else None


def is_words(text: str) -> bool:
    """Tell whether an answer is words, such as a name, which as a formula would be a product."""
    return bool(_WORDS_PATTERN.fullmatch(text)) and not _FUNCTION_PATTERN.search(text)


def strip_text_command(text: str) -> str:
    r"""Return the content of an answer that is all `\text{}`, or the answer."""
    match = re.fullmatch(r"\\(?:text|textbf|mathrm|mbox|textit)\s*\{([^{}]*)\}", text.strip())
    return match[1].strip() if match else text


def have_other_bases(first: str, second: str) -> bool:
    """Tell whether two numbers are written in different bases, as 21_7 and 21_8 are."""
    bases = [re.search(r"(?<=\d)_\{?(\d+)\}?$", text) for text in (first, second)]
    return all(bases) and len({match[1] for match in bases if match}) > 1


def _to_fraction(match: re.Match[str]) -> str:
    r"""Return 0.1\overline{6} as a fraction: (16 - 1) / 90."""
    sign, whole, start = match[1], match[2] or "0", match[3]
    period = next(filter(None, match.groups()[3:]))
    numerator = int(whole + start + period) - int(whole + start)
    denominator = (10 ** len(period) - 1) * 10 ** len(start)
    return rf"{sign}\frac{{{numerator}}}{{{denominator}}}"
