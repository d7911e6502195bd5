"""Speed and memory of the library, as ratios measured in one run; see README.md."""
