"""What the toy rungs are made of: data, rulers, networks, the ladder of trainings, claims and pictures."""
