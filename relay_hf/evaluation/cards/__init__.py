"""From evaluations of either kind into the card of the model that was evaluated."""
