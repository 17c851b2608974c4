"""Plans what a program needs on chips that are not there, by the compiler for these chips.

speeds.py         the speeds and the memory of each chip that can be planned for
chips.py          devices of chips that are not there
compiling.py      compiles a program until the compiler knows what it needs
hlo.py            reads the text of a compiled program
operations.py     counts its products and convolutions
collectives.py    finds what chips exchange
totals.py         adds up what a program does
parts.py          breaks the totals down by part of the networks and by operation
step_plan.py      the plan of one step on one chip: memory, roofline, and the text that `omnicodec plan` prints
programs.py       plans the training steps of the codec and of the language model
tokenization.py   plans the programs that turn audio into tokens.
"""
