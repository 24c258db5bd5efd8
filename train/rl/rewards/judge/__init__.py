"""Judges a program by tests, with program and tests in two processes. It runs in the sandbox.

`main` is the judge: it has the tests, calls the program over a connection, and alone writes the
verdict. `program` runs the program, and has neither the tests nor the right values. `connection`
carries calls and values between the two. All of it imports the standard library alone, because the
sandbox's interpreter need not have anything else.
"""
