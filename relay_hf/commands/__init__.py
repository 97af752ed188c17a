"""The commands of `relay-hf`, one file each, thin over the library.

A file has `run(program, argv)`: it parses its own arguments and calls the library. It is imported only when its command
is asked for, so that no command waits for what only another one needs. What needs torch is imported once the arguments
are parsed, so that neither `--help` nor a sentence about a wrong option waits for it.
"""
