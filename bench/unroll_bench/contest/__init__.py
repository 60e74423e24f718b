"""`make bench`: measures all contestants in one run, in turns, and compares ours with their bars."""
