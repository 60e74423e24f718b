"""What is measured inside a process: it runs in a worker process pinned to the serving core."""
