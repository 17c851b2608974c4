"""Plans: what a program needs on chips that are not there, as the compiler for these chips says.

chips.py       the chips that can be planned for
compiling.py   compiles a program until the compiler knows what it needs
hlo.py         counts what a compiled program does
step_plan.py   one step on one chip: memory, roofline, and the text that `omnicodec plan` prints
programs.py    the programs that can be planned, a function for each.
"""
