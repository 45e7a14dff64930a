# C++ test programs: plain executables that return non-zero on failure.
