"""How long the tests may look: `HYPOTHESIS_PROFILE=nightly` (`make nightly`), or what a change can wait for."""

import os
from typing import Final

NIGHTLY: Final = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
