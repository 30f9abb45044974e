"""What the tests of the doctor's rows share."""

from zimage.doctor.configuration import Configuration, read_configuration
from zimage.doctor.row import Row


def configured() -> Configuration:
    """The configuration in force, which is valid."""
    row, configuration = read_configuration()
    assert configuration is not None, row
    return configuration


def named(rows: list[Row], what: str) -> Row:
    """The only row of that name."""
    (row,) = (row for row in rows if row.what == what)
    return row
