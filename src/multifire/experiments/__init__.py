"""Many runs, finished runs, and runs before they are made: sweep, compare, score, bench, plan, summary."""
