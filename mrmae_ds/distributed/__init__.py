"""Launch, process group, collectives and watchdog."""
