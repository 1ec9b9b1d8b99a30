"""The embedded model: a tiny LLaVA-OneVision trained from scratch on synthetic clips.

Importing this package is light: it names the folder of the weights and loads neither torch nor transformers.
The folder is an ordinary Hugging Face checkpoint; README.md beside this file is its model card.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
