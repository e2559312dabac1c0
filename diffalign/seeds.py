"""Seeds that share nothing."""


def mix(*numbers: int) -> int:
    """One seed of several numbers, such that neighbors in any of them share nothing (splitmix64's finalizer)."""
    value = 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value & (2**63 - 1)
