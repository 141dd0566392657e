"""Weight-only quantisation: what is asked for, which parameters it touches, and the arithmetic."""
