import pytest
from timm.data import ImageNetInfo
from torchvision.models import ResNet50_Weights

from calib_guidance.data import imagenet_labels, imagenet_names
from calib_guidance.errors import ConfigurationError

SYNSETS = ImageNetInfo("imagenet-1k").label_descriptions()
CATEGORIES = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
# Names of a data set have to differ, and two synsets are "crane".
HUB = ["crane2" if number == 517 else name for number, name in enumerate(SYNSETS)]


def test_the_order_is_torchvision_s():
    assert imagenet_names()[0] == CATEGORIES
    for names in (ImageNetInfo("imagenet-1k").label_names(), HUB, CATEGORIES):
        assert imagenet_labels(names, "x") == list(range(1000))


def test_labels_are_renumbered_by_name():
    swapped = HUB.copy()
    swapped[0], swapped[999] = swapped[999], swapped[0]
    assert imagenet_labels(swapped, "x") == [999, *range(1, 999), 0]
    assert imagenet_labels(["n01484850", "n01440764"], "x") == [2, 0]
    assert imagenet_labels(["crane", "crane bird", "maillot", "maillot, tank suit"], "x") == [517, 134, 638, 639]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["n01440764", "n0144076", "cat"], r"x: 2 of 3 class names are not ImageNet's: 'n0144076' \(class 1\), 'cat'"),
        (["tench", "crane"], "'crane' may mean the ImageNet classes 134, 517; use WordNet ids"),
        (["tench", "n01440764"], "several names for one ImageNet class: 'n01440764', 'tench'"),
    ],
)
def test_names_that_mean_nothing_or_two_things_are_errors(names, message):
    with pytest.raises(ConfigurationError, match=message):
        imagenet_labels(names, "x")


def test_another_order_of_torchvision_s_is_an_error(monkeypatch):
    other = CATEGORIES.copy()
    other[3], other[4] = other[4], other[3]
    monkeypatch.setitem(ResNet50_Weights.IMAGENET1K_V2.meta, "categories", other)
    with pytest.raises(
        ConfigurationError, match="class 3 is 'tiger shark, Galeocerdo cuvieri' to timm and 'hammerhead' to"
    ):
        imagenet_names.__wrapped__()
