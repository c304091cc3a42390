"""MultiID-Bench: how alike, how copied, how blended."""
