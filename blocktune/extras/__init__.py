"""Plug-ins that come with the package: `blocktune.plugins` imports every module here.

They show what a method of one's own can do from outside. No other part imports them.
"""
