"""Numbers as figures and the page write them."""

import math

MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"
UNKNOWN = "–"


def number(value: float, digits: int = 3) -> str:
    """A number in so many significant digits, without exponents where it can be read: "0.0213", "−1.2", "1 234"."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace(",", THIN).replace("-", MINUS)
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    text = f"{value:.{decimals}f}" if decimals <= 6 else f"{value:.{digits - 1}e}"
    return text.replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign."""
    return ("+" if math.isfinite(value) and value > 0 else "") + number(value, digits)


def percent(share: float, decimals: int = 0) -> str:
    """A share as "83 %"."""
    return UNKNOWN if not math.isfinite(share) else f"{100 * share:.{decimals}f}{THIN}%"


def interval(low: float, high: float, decimals: int = 2) -> str:
    """An interval as "[0.80, 0.88]"; empty if it is not known."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{fixed(low, decimals)}, {fixed(high, decimals)}]"


def fixed(value: float, decimals: int = 2) -> str:
    """A number with so many decimals; "0.00" has no sign."""
    return UNKNOWN if not math.isfinite(value) else f"{value:z.{decimals}f}".replace("-", MINUS)


def whole(count: float) -> str:
    """A count: "1 234"."""
    return f"{count:,.0f}".replace(",", THIN)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun: "1 node", "60 nodes"."""
    return f"{whole(count)} {noun if count == 1 else plural or noun + 's'}"
