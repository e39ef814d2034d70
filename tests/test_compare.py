"""Which experiments `bigbatch compare` puts into one report."""

import pytest

from bigbatch.commands.compare import families
from bigbatch.config.file import compared_names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["decay", "increase"], {"": ["decay", "increase"]}),
        (
            ["decay", "decay-adam", "large", "large-adam"],
            {"": ["decay", "large"], "adam": ["decay-adam", "large-adam"]},
        ),
        (
            ["cosine", "late", "cosine-muon", "late-muon"],
            {"": ["cosine", "late"], "muon": ["cosine-muon", "late-muon"]},
        ),
        # Without a reference of its own a variant is compared with the others.
        (["decay", "increase-adam"], {"": ["decay", "increase-adam"]}),
        (["increase-adam", "decay-adam"], {"adam": ["increase-adam", "decay-adam"]}),
    ],
)
def test_a_variant_with_its_own_decay_is_a_family(names, expected):
    assert families(names) == expected


@pytest.mark.parametrize("file", ["cifar10", "fashion_mnist"])
def test_the_papers_optimizers_are_families(file):
    found = families(compared_names(f"configs/{file}.py"))
    assert set(found) == {"", "nesterov", "sgd", "adam"}
    for variant, names in found.items():
        suffix = f"-{variant}" if variant else ""
        assert {f"decay{suffix}", f"hybrid{suffix}", f"increase{suffix}"} <= set(names)
