"""What the tests of files/ share: the small job and the disks of tests/faults, and a body builder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "faults"))
