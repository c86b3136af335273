"""Folders of this machine and of object stores; no video decoder."""
