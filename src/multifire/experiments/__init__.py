"""Work with many runs and with finished runs, and estimate a run: sweep, compare, score, bench, plan, summary."""
