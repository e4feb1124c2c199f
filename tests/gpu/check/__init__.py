"""One command for the card: every Triton kernel's answers, then its times. Run it as `make gpu`."""
