"""The admin listener: the same servicers in a single process and in workers; a supervisor's merge their answers."""
