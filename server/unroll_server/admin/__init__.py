"""The admin listener: what operators ask of a server, wherever its models are served."""
