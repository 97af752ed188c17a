"""Small tasks with known answers, on which a Relay model can be trained and measured on one machine."""
