"""Training of the face adapter: `python -m train --config train/phases/phase_1.yaml` (see
train/README.md)."""
