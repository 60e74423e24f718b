"""`make bench`: every contestant in one run, in turns, with what the issue's table asks of each."""
