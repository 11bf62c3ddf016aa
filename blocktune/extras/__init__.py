"""Plug-ins that come with the package, as examples; `blocktune.plugins` imports them all."""
