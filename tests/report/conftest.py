import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that `sheets` and `browser` can be imported by name
