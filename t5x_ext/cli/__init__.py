"""Floor 6: the `t5x_ext` command, one module a verb, and the only place where flags and gin are read.

A verb's module has three things: its docstring, which is its help text; `define_flags(values)`; and `main(values)`,
which may return an exit code.
Verbs import the rooms below inside their functions, so that help and a misspelt flag answer before JAX starts.
"""
