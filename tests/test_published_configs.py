"""One configuration per published row: each composes, has its full-size architecture, and runs shrunken through main()."""

import re

from tests.conftest import ROOT

PREDICT = ROOT / "lightning_configs" / "predict"
ROWS = sorted(str(path.relative_to(PREDICT)) for folder in PREDICT.glob("imagenet*/") for path in folder.rglob("*.yaml"))


def test_the_table_names_every_row_once():
    text = (ROOT / "lightning_configs" / "README.md").read_text()
    named = re.findall(r"^\|.*\| `(imagenet[\w/.]+\.yaml)` \|$", text, re.MULTILINE)
    assert sorted(named) == ROWS
    assert len(ROWS) == 50
