"""What we are held against: servers that each run as a process of their own."""
