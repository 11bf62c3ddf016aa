"""Plug-ins that come with the package: `blocktune.plugins` imports every module here.

They show what a plug-in can do. No other part of the package imports them.
"""
