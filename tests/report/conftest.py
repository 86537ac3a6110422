"""What the tests of the report share: made_runs.py."""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parent))  # pytest's import mode adds nothing by itself

from made_runs import make_run  # noqa: E402

__all__ = ['make_run']
