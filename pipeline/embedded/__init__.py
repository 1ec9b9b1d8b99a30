"""The embedded models: tiny LLaVA-OneVisions trained on synthetic clips.

Importing this package is light: it names the folders of the weights and loads neither torch nor transformers.
The folders are ordinary Hugging Face checkpoints; README.md beside this file is the first model's card, and
long/README.md that of the second, which sees 32 frames.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
LONG_MODEL_DIR = Path(__file__).parent / "long" / "model"

MODEL_DIRS = {"embedded": MODEL_DIR, "embedded-long": LONG_MODEL_DIR}
"""What `--model` calls them."""
