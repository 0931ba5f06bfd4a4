"""Plan memory, time and communication of a recipe before anything is submitted: ``mrmae plan``."""
