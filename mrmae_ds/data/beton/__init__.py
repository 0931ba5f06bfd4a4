"""The .beton file format and its JSON sidecar."""
