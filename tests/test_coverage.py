"""The table of what works is what trying it comes to now."""

import pytest
from docs import make_coverage

from onebase.adapters.build import BUILDERS
from onebase.config.methods import METHODS
from tests import families


def test_every_method_is_tried() -> None:
    tried = {kind for kind, _ in families.variants().values()}
    assert tried == set(BUILDERS) <= set(METHODS.values())


def test_a_setting_that_is_silently_left_out_ends_the_script() -> None:
    bank = families.bank_on("llama")
    kind, settings = families.VARIANTS["lora"]
    columns = make_coverage.columns_of(bank)["linear"]
    assert make_coverage.tried(bank, kind, settings, columns).word == make_coverage.YES
    parts = bank.add("elsewhere", kind(**settings, target_modules=["down_proj"])).parts
    with pytest.raises(AssertionError, match="nothing was put on"):
        make_coverage.check_place(bank, parts, columns[0])


@pytest.mark.slow
def test_the_page_says_what_trying_says_now() -> None:
    written = make_coverage.PAGE.read_text(encoding="utf-8")
    assert written == make_coverage.page(), "run: python -m docs.make_coverage"
