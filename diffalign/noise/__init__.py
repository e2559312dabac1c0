"""Better pictures from a frozen model, by its noise: `optimize_noise` is the door, a file each is a method.

A method is a frozen dataclass whose keywords are its settings and whose `search` yields what it has looked at. Best
pictures, history, interruption and files are the driver's (`diffalign.noise.driver`).
"""

NOISE_METHODS: dict[str, str] = {
    "reno": "diffalign.noise.reno:ReNO",
    "best_of_n": "diffalign.noise.best_of_n:BestOfN",
    "zero_order": "diffalign.noise.zero_order:ZeroOrder",
    "paths": "diffalign.noise.paths:Paths",
    "fk": "diffalign.noise.fk:FKSteering",
    "dno": "diffalign.noise.dno:DNO",
}
