"""Files that ship with diffalign: this module only marks the folder as a package."""
