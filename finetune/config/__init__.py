"""The one config, from which the command line, the YAML and the Python arguments derive."""
