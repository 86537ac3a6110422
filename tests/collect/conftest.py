"""What the tests of the application share: people_client.py."""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parent))  # pytest's import mode adds nothing by itself
