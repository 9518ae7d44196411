"""What several test files share: the rendered book, built once a session."""

import warnings

import pytest

from tests import rendered


@pytest.fixture(scope="session")
def html():
    """The folder of the rendered book, as `make html` makes it from the stored outputs."""
    if not rendered.GIVEN:
        from tiltlib import book

        book.html_only()
    return rendered.HTML


@pytest.fixture
def strict():
    """A warning is an error: for files that say `pytestmark = pytest.mark.usefixtures("strict")`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
