"""The only I/O below floor 2: files and folders that appear whole, remote paths, locks, barriers, digests.

Import from the modules: `storage.files` and `storage.remote` need the standard library only, so that commands can use
them before JAX is loaded.
"""
