"""Where the benchmarks find things. Import it before ``longyarn``, which it makes importable."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
RUN = ROOT / "results" / "micro"  # the finished default run

sys.path.insert(0, str(SCRIPTS))
