import inspect

import pytest

from trivium.losses.family import FAMILY, meaningful_to


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_the_table_says_what_the_loss_really_takes(name):
    """Its arguments by name, and as many tensors as sides (and rows) say; no setting is left to a silent default."""
    kind = FAMILY[name]
    parameters = inspect.signature(kind.compute).parameters
    settings = [each for each in parameters if each in ("beta", *kind.arguments)]
    assert settings[0] == "beta" and set(settings) == {"beta", *kind.arguments}
    tensors = [each for each in parameters if each not in settings and each != "label_smoothing"]
    if kind.paired:
        assert len(tensors) == (4 if kind.uses_reference else 2)
    else:
        assert tensors == ["policy", "reference", "desirable", "baseline"]


def test_who_takes_what():
    assert meaningful_to("label_smoothing") == ("dpo", "robust")
    assert meaningful_to("length_normalised") == ("dpo", "robust", "hinge")
    assert meaningful_to("gamma") == ("simpo",)
    assert meaningful_to("nll_coef") == ("dpo", "robust", "hinge", "ipo", "simpo")
    assert meaningful_to("undesirable_weight") == ("kto",)
    assert meaningful_to("no_such_setting") == ()
