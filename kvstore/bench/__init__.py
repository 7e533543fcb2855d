"""What `kvstore bench` runs: one module a sub-verb, each a function from a shape and options to a `Report`.

A case is a name and a function to be timed; all cases of a bench take turns, round by round, so that what happens to
the machine meanwhile happens to all of them. Where there is a ceiling (a memcpy, a plain read, a load without a
store) it is a case too, and ratios are between medians of the same run.
"""
