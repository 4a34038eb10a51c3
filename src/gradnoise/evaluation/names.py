"""Which scores exist: read by plans and workflows too, so nothing heavy is imported."""

# Scores and their units by kind of task.
NAMES = {
    "pair": {
        "icl": "accuracy",
        "iwl": "accuracy",
        "swap_context": "accuracy",
        "swap_weights": "accuracy",
        "validation_loss": "nats",
    },
    "text": {"validation_loss": "nats", "bits_per_character": "bits"},
}
