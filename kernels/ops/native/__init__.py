"""Sentei's own CPU programs: C++ built at first use, called through ctypes."""
