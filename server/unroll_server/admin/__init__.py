"""The admin listener. A single process and a worker have the same servicers; a supervisor merges its workers'."""
