"""The long embedded model: 32 frames of small and large objects under pans, cuts and noise; README.md is its card."""
