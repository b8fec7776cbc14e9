"""Quantities in a recipe: token counts (`2M`), intervals (`200 steps`), spans of the run (`10%`), SLURM time
limits (`1-12:00:00`)."""

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_serializer,
    model_validator,
)

SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
LARGEST = 2**63
_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\+?\d{1,2})?)([kmbt]?)", re.IGNORECASE)
_DECIMAL = re.compile(r"\d+(?:\.\d+)?")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def parse_count(value: object) -> int:
    """An integer from `524288`, `524_288`, `524,288`, `2M` or `1.5B`; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a count such as 2M or 524288, not {value!r}")
    if isinstance(value, str):
        match = _COUNT.fullmatch(value.strip().replace("_", "").replace(",", ""))
        if not match:
            raise ValueError(f"expected a count such as 2M or 524288, not {value!r}")
        # Decimal is exact; the float 64.1 * 1000 is not.
        number = Decimal(match[1]) * SUFFIX[match[2].lower()]
    else:
        number = Decimal(value)
    if not number.is_finite() or not 0 <= number < LARGEST or number != int(number):
        raise ValueError(f"a count must be a whole number from 0 to below 2^63, not {value!r}")
    return int(number)


def format_count(number: int) -> str | int:
    """A count in short form where that is exact: 2000000 -> `2M`; 524288 stays a number."""
    for suffix, scale in sorted(SUFFIX.items(), key=lambda item: -item[1]):
        if scale > 1 and number >= scale and number % (scale // 10) == 0:
            whole, tenths = divmod(number // (scale // 10), 10)
            return f"{whole}.{tenths}{suffix.upper()}" if tenths else f"{whole}{suffix.upper()}"
    return number


def parse_time_limit(value: object) -> int | None:
    """Seconds of a time limit in SLURM's forms: `90` (minutes), `90:00`, `24:00:00`, `2-12`, `2-12:30:00`.

    None stands for no limit, written `UNLIMITED` or 0. Raises ValueError for anything else.
    """
    text = str(value).strip()
    if text.upper() == "UNLIMITED":
        return None
    match = None if isinstance(value, bool) else _TIME.fullmatch(text)
    if match:
        days, *rest = match.groups()
        numbers = [int(part) for part in rest if part is not None]
        if days is not None or len(numbers) == 3:
            hours, minutes, seconds = (*numbers, 0, 0)[:3]
        else:
            hours, minutes, seconds = 0, *(*numbers, 0)[:2]
        if seconds < 60 and (minutes < 60 or (days is None and len(numbers) < 3)):
            return 86_400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds or None
    raise ValueError(f"expected a time such as 90 (minutes), 24:00:00 or 2-12:00:00 (days-), not {value!r}")


def _checked_time(value: object) -> str:
    parse_time_limit(value)
    return str(value).strip()


def _decimal(number: float) -> str:
    """A number without an exponent, to twelve places."""
    return f"{number:.12f}".rstrip("0").rstrip(".")


TimeLimit = Annotated[str, BeforeValidator(_checked_time)]
TokenCount = Annotated[int, BeforeValidator(parse_count), PlainSerializer(format_count, when_used="json")]


class _Quantity(BaseModel):
    """An amount and its unit, as a recipe writes them; a subclass says which units it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    amount: float = Field(ge=0, allow_inf_nan=False)
    unit: str

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            amount, unit = cls._read(str(value).strip().lower())
            return {"amount": amount, "unit": unit}
        return value

    @classmethod
    def _read(cls, text: str) -> tuple[float, str]:
        """(amount, unit) of a text in lower case; ValueError if it is none."""
        raise NotImplementedError

    @model_serializer
    def _write(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if self.unit == "minutes":
            return f"{_decimal(self.amount)} min"
        if self.unit == "fraction":
            return f"{_decimal(self.amount * 100)}%"
        whole = min(int(self.amount), LARGEST - 1)  # a float rounds that one up
        return str(format_count(whole)) + (" steps" if self.unit == "steps" else "")


class Every(_Quantity):
    """An interval: `100K` tokens, `200 steps` or `30 min`."""

    amount: float = Field(gt=0, allow_inf_nan=False)
    unit: Literal["tokens", "steps", "minutes"]

    @model_validator(mode="before")
    @classmethod
    def _is_clear(cls, value: object) -> object:
        if isinstance(value, str) and re.fullmatch(r"[\d.]+m", value.strip()):  # elsewhere minutes
            number = value.strip()[:-1]
            raise ValueError(f"{number}m is millions or minutes: write {number}M (tokens) or '{number} min'")
        return value

    @classmethod
    def _read(cls, text: str) -> tuple[float, str]:
        match = re.fullmatch(r"(.*?\d[kmbt]?)\s*(steps?|min(?:utes?)?|tokens?|)", text)
        unit = {"s": "steps", "m": "minutes"}.get(match[2][:1], "tokens") if match else "minutes"
        if match and (unit != "minutes" or _DECIMAL.fullmatch(match[1])):
            amount = float(match[1]) if unit == "minutes" else parse_count(match[1])
            if amount > 0:
                return amount, unit
        raise ValueError(
            f"expected an interval such as '100K' (tokens), '200 steps' or '30 min', not {text!r}"
        )


class Span(_Quantity):
    """A part of the run: `10%` or 0.1 of the budget, `2M` tokens, or `200 steps`."""

    unit: Literal["fraction", "tokens", "steps"]

    @classmethod
    def _read(cls, text: str) -> tuple[float, str]:
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
            return float(match[1]) / 100, "fraction"
        if match := re.fullmatch(r"(.*\d[kmbt]?)\s*steps?", text):
            return parse_count(match[1]), "steps"
        if text == "1":
            raise ValueError("1 is the whole budget or one step: write 100% or '1 steps'")
        if re.fullmatch(r"[01]?\.\d+|0|1\.0*|\d(\.\d+)?e-\d+", text):
            return float(text), "fraction"
        return parse_count(text), "tokens"

    @model_validator(mode="after")
    def _check(self) -> "Span":
        if self.unit == "fraction" and not 0 <= self.amount <= 1:
            raise ValueError(f"a share of the budget lies between 0% and 100%, not {self.amount:.0%}")
        return self

    def steps(self, total_steps: int, tokens_per_step: int) -> int:
        """Length of the span in optimizer steps, in a run of `total_steps`."""
        if self.unit == "fraction":
            return round(self.amount * total_steps)
        return int(self.amount) if self.unit == "steps" else round(self.amount / tokens_per_step)

    def share(self, total_steps: int, tokens_per_step: int) -> float:
        """Length of the span as an unrounded fraction of such a run."""
        if self.unit == "fraction":
            return self.amount
        return self.amount / total_steps / (tokens_per_step if self.unit == "tokens" else 1)
