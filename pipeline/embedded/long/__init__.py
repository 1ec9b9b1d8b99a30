"""The long embedded model: 32 frames of small and large objects under pans, cuts and noise.

Importing this package is light, like `pipeline.embedded`. README.md beside this file is the model card.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
