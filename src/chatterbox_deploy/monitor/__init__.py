"""What a fleet does while somebody watches: look after look, told to people on a terminal and to other programs."""
