"""Programs timed side by side in one run: medians and ratios, since machines are noisy."""
