"""The ``mrmae`` command, one module per subcommand."""
