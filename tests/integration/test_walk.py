"""docs/deployment.md, "By hand, in production mode", with a Vault."""

from __future__ import annotations

import os
import shlex

import pytest

from tests.harness.pages import block
from tests.harness.vault_binary import chosen
from tests.harness.walk import walk

# A Vault as its operators leave it: unsealed, with an audit device, and nothing of keyvault's.
_VAULT = """
mkdir $W/vault
export BYOKEEP_TEST_VAULT={name} BYOKEEP_{NAME}_BIN={binary}
python -m tests.harness.vault $W/vault >$W/vault.log 2>&1 &
until [ -e $W/vault/settings ]; do kill -0 $!; sleep 0.1; done
. $W/vault/settings
"""


@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a network of its own")
def test_from_nothing_to_a_review_in_production_mode():
    product = chosen()
    name, binary = product.name, shlex.quote(str(product.binary()))
    vault = _VAULT.format(name=name, NAME=name.upper(), binary=binary)
    # The keyring of a step before is gone: nothing can have used it.
    walk(
        beside=vault, after_settings=block("docs/deployment.md", "vault") + "\nrm $D/keyring.json\n"
    )
