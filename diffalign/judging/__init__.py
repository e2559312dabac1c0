"""Groups of pictures judged by people on a local page: choices in a database, preferences to train on."""
