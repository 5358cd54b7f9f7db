"""What every section of the configuration is made of."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are mistakes, values are not converted behind the user's back."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def mistake(key: tuple[str | int, ...], value: object, message: str) -> ValidationError:
    """What a rule across keys raises when the value of one of them, below its section, breaks it."""
    told = InitErrorDetails(type="value_error", loc=key, input=value, ctx={"error": ValueError(message)})
    return ValidationError.from_exception_data("mistake", [told])


def below(key: tuple[str | int, ...], error: ValidationError) -> ValidationError:
    """The mistakes of values that lie at a key of the section that checks them."""
    told = [
        InitErrorDetails(
            type=found["type"], loc=(*key, *found["loc"]), input=found["input"], ctx=found.get("ctx", {})
        )
        for found in error.errors()
    ]
    return ValidationError.from_exception_data(error.title, told)


def check_different(key: str, names: Sequence[str]) -> None:
    """Check the names of a list's members.

    :raises ValidationError: the first name that an earlier one has.
    """
    for number, name in enumerate(names):
        if name in names[:number]:
            raise mistake(
                (key, number, "name"), name, f"{key} need different names, and an earlier one has this"
            )
