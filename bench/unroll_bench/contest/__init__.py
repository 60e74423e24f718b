"""`make bench`: every contestant in one run, in turns, and the bars that our own are held against."""
