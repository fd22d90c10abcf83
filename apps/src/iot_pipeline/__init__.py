"""Image inference over Kafka: produce, infer, store and audit."""
