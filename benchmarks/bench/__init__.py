"""What the programs share: `running` and timing, a `study` through verbs, random `models`, arguments and `results`."""
